"""sdtrain-evaluate: measures a trained model."""

import sys

import hydra
from omegaconf import DictConfig

from sdtrain.config.boundary import bounded_main, overrides_here
from sdtrain.paths import config_dir


@hydra.main(config_path=str(config_dir()), config_name="evaluate", version_base="1.3")
def app(cfg: DictConfig) -> None:
    from sdtrain.evaluation.look import bounded, evaluate, evaluate_root

    bounded(evaluate, cfg, evaluate_root, overrides_here())


def main() -> None:
    bounded_main(app, "evaluate", sys.argv[1:])


if __name__ == "__main__":
    main()
