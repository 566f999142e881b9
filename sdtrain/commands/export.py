"""The command sdtrain-export: write a trained model as a pipeline of diffusers."""

from omegaconf import DictConfig, OmegaConf

from sdtrain.config.boundary import run_command
from sdtrain.config.compose import current_overrides
from sdtrain.config.importing import collector_off
from sdtrain.config.run_readers import check_export


def task(cfg: DictConfig) -> None:
    settings = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    config = check_export(settings, current_overrides())
    with collector_off():
        from sdtrain.export.export import export

    written = export(config)
    print(f"{written} in {config.output}")


def main() -> None:
    run_command(task, "export")


if __name__ == "__main__":
    main()
