"""Load a pipeline of diffusers as a model of sdtrain."""

from pathlib import Path

from sdtrain.assemble.model import build_model
from sdtrain.config.compose import PRIMARY, compose_config
from sdtrain.config.overrides import text_override
from sdtrain.errors import UserError
from sdtrain.latent_diffusion import LatentDiffusion
from sdtrain.models.pipeline_folder import INDEX


def is_pipeline(folder: Path) -> bool:
    """Whether a folder is a pipeline of diffusers."""
    return (folder / INDEX).is_file()


def load_pipeline(folder: Path, device: str) -> tuple[LatentDiffusion, int]:
    """Return the model of a pipeline, and the side of its pictures in pixels.

    Raises UserError, which names `checkpoint`, if it cannot be read.
    """
    try:
        pretrained = text_override("model.pretrained", str(folder))
        config = compose_config(PRIMARY, ["model=stable_diffusion", pretrained])
        model = build_model(config, folder)
    except UserError as error:
        raise UserError(
            error.problem,
            key="checkpoint",
            value=str(folder),
            remedy="Give the folder of a run, or of another pipeline.",
        ) from error
    return model.to(device).eval(), config["data"]["image_size"]
