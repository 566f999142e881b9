"""sdtrain-sample: draws pictures with a trained model."""

import sys

import hydra
from omegaconf import DictConfig

from sdtrain.config.boundary import bounded_main, overrides_here
from sdtrain.paths import config_dir


@hydra.main(config_path=str(config_dir()), config_name="sample", version_base="1.3")
def app(cfg: DictConfig) -> None:
    from sdtrain.evaluation.look import bounded, sample, sample_root

    bounded(sample, cfg, sample_root, overrides_here())


def main() -> None:
    bounded_main(app, "sample", sys.argv[1:], repeatable="prompt")


if __name__ == "__main__":
    main()
