"""The command sdtrain-evaluate: measure a trained model."""

import sys

from omegaconf import DictConfig, OmegaConf

from sdtrain.config.boundary import run_command
from sdtrain.config.compose import current_overrides
from sdtrain.config.importing import collector_off
from sdtrain.config.overrides import add_data_key, choose_options
from sdtrain.config.run_readers import check_evaluate


def task(cfg: DictConfig) -> None:
    settings = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    config = check_evaluate(settings, current_overrides())
    with collector_off():
        from sdtrain.assemble.subject import load_subject
        from sdtrain.evaluation.evaluate import evaluate

    evaluate(config, lambda path: load_subject(config, path))


def main() -> None:
    sys.argv[1:] = [add_data_key(choose_options(word)) for word in sys.argv[1:]]
    run_command(task, "evaluate")


if __name__ == "__main__":
    main()
