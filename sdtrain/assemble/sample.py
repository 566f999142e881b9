"""Draw the pictures of sdtrain-sample with a checkpoint."""

from pathlib import Path

from sdtrain.assemble.adapters import add_adapters
from sdtrain.assemble.drawing import build_drawing
from sdtrain.assemble.load import load, pick_device
from sdtrain.assemble.load_pipeline import load_pipeline, warn_of_options_of_runs
from sdtrain.assemble.model import check_network
from sdtrain.config.schema import SampleConfig
from sdtrain.console import warn
from sdtrain.errors import UserError
from sdtrain.generation.sample import sample
from sdtrain.latent_diffusion import LatentDiffusion
from sdtrain.models.hub import find_checkpoint_pipeline
from sdtrain.models.pipeline_folder import INDEX, is_pipeline
from sdtrain.runs.layout import CheckpointFolder
from sdtrain.types import PictureSize


def sample_checkpoint(config: SampleConfig) -> int:
    """Draw the requested pictures with a complete checkpoint, or with a pipeline of diffusers, and
    return their number.

    Raises UserError as `load`, `load_pipeline`, `build_drawing` and `sample` do.
    """
    if is_pipeline(Path(config.checkpoint)):
        warn_of_options_of_runs(config)
        if config.data:
            warn(f"data has no effect: checkpoint={config.checkpoint} is a pipeline.")
        source = Path(config.checkpoint)
        model, own_size = load_pipeline(source, pick_device(config.accelerator))
        add_adapters(config, model)
        image_size = size_to_draw(model, config.image_size, own_size)
        drawing = build_drawing(vars(config), model.objective.schedule)
        config_file = find_checkpoint_pipeline(source) / INDEX
        return sample(config, model, drawing, image_size, config_file=config_file)
    loaded = load(
        CheckpointFolder(Path(config.checkpoint)),
        ema=config.ema,
        device=pick_device(config.accelerator),
        allow=config.allow,
        autoencoder=config.autoencoder,
        pretrained=config.model["pretrained"],
        data=config.data,
    )
    add_adapters(config, loaded.model)
    image_size = size_to_draw(loaded.model, config.image_size, loaded.image_size)
    if config.data and not loaded.training_data.was_used:
        warn("data has no effect: the run's folder holds everything that sampling needs.")
    drawing = build_drawing(vars(config), loaded.model.objective.schedule)
    untrained = loaded.record.untrained if loaded.record else ()
    return sample(
        config,
        loaded.model,
        drawing,
        image_size,
        config_file=loaded.checkpoint.config,
        untrained=untrained,
    )


def size_to_draw(
    model: LatentDiffusion, typed: int | list[int] | None, own_size: int
) -> PictureSize:
    """Return the size of the pictures: `typed`, or the model's own if that is None.

    typed: the key image_size, a side or [height, width] in pixels. Raises UserError if the model
    cannot draw that size.
    """
    if typed is None:
        return own_size
    size = typed if isinstance(typed, int) else tuple(typed)
    try:
        check_network(model, size)
    except UserError as error:
        problem = error.problem
        if not error.has_value:  # a sentence of its own
            problem = f"is not a size that this model draws: {problem}"
        raise UserError(problem, key="image_size", value=typed, remedy="Change it.") from error
    return size
