"""sdtrain-sample: draws pictures with a trained model."""

from omegaconf import DictConfig, OmegaConf

from sdtrain.config.boundary import run_command
from sdtrain.config.compose import current_overrides
from sdtrain.config.reading import check_sample


def task(cfg: DictConfig) -> None:
    settings = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    config = check_sample(settings, current_overrides())
    from pathlib import Path

    from sdtrain.assemble.drawing import build_drawing
    from sdtrain.assemble.load import load_whole, pick_device
    from sdtrain.generation.sample import sample
    from sdtrain.runs.layout import CheckpointFolder

    loaded = load_whole(
        CheckpointFolder(Path(config.checkpoint)),
        ema=config.ema,
        device=pick_device(config.accelerator),
        allow=config.allow,
        autoencoder=config.autoencoder,
    )
    drawing = build_drawing(vars(config), loaded.model.objective.schedule)
    count = sample(config, loaded.model, drawing, loaded.image_size)
    print(f"{count} pictures and grid.png in {config.output}")


def main() -> None:
    run_command(task, "sample", repeatable="prompt")


if __name__ == "__main__":
    main()
