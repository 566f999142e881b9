"""The command sdtrain-sample: draw pictures with a trained model."""

import sys

from omegaconf import DictConfig, OmegaConf

from sdtrain.config.boundary import run_command
from sdtrain.config.compose import current_overrides
from sdtrain.config.importing import collector_off
from sdtrain.config.overrides import add_data_key
from sdtrain.config.run_readers import check_sample

REPEATABLE = ("prompt", "embedding", "lora", "lora_weight")
"""Keys that may be set several times."""


def task(cfg: DictConfig) -> None:
    settings = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    config = check_sample(settings, current_overrides())
    with collector_off():
        from sdtrain.assemble.sample import sample_checkpoint

    count = sample_checkpoint(config)
    noun = "picture" if count == 1 else "pictures"
    sheets = "grid.png and attention.png" if config.attention else "grid.png"
    print(f"{count} {noun} and {sheets} in {config.output}")


def main() -> None:
    sys.argv[1:] = [add_data_key(word) for word in sys.argv[1:]]
    run_command(task, "sample", repeatable=REPEATABLE)


if __name__ == "__main__":
    main()
