"""Load a checkpoint as the subject of metrics."""

from sdtrain.assemble.drawing import build_drawing
from sdtrain.assemble.load import load, pick_device
from sdtrain.config.schema import EvaluateConfig
from sdtrain.evaluation.subject import Subject
from sdtrain.runs.layout import CheckpointFolder


def load_subject(config: EvaluateConfig, checkpoint: CheckpointFolder) -> Subject:
    """Load the model of a complete checkpoint, and build how its pictures are drawn.

    Raises UserError if either fails.
    """
    loaded = load(
        checkpoint,
        ema=config.ema,
        device=pick_device(config.accelerator),
        allow=config.allow,
        autoencoder=config.autoencoder,
        pretrained=config.model["pretrained"],
        data=config.data,
    )
    scale = config.guidance_scale
    if scale is None:
        scale = loaded.cfg["guidance_scale"]
    settings = vars(config) | {"guidance_scale": scale}
    return Subject(
        model=loaded.model,
        drawing=build_drawing(settings, loaded.model.objective.schedule),
        image_size=loaded.image_size,
        num_images=config.num_images,
        seed=config.seed,
        data_source=loaded.training_data,
        record=loaded.record,
    )
