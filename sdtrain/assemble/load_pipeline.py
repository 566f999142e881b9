"""Load a pipeline of diffusers as a model of sdtrain."""

from pathlib import Path

from sdtrain.assemble.model import build_model
from sdtrain.config.compose import PRIMARY, compose_config
from sdtrain.config.overrides import text_override
from sdtrain.config.schema import EvaluateConfig, SampleConfig
from sdtrain.console import warn
from sdtrain.latent_diffusion import LatentDiffusion
from sdtrain.models.hub import errors_name_checkpoint


def load_pipeline(source: Path, device: str) -> tuple[LatentDiffusion, int]:
    """Return the model of a pipeline, and the side of its pictures in pixels.

    source: a folder or a single file. Raises UserError, which names `checkpoint`, if it cannot be
    read.
    """
    with errors_name_checkpoint(source):
        pretrained = text_override("model.pretrained", str(source))
        config = compose_config(PRIMARY, ["model=stable_diffusion", pretrained])
        model = build_model(config, source)
    return model.to(device).eval(), config["data"]["image_size"]


def warn_of_options_of_runs(config: SampleConfig | EvaluateConfig) -> None:
    """Warn of options that have no effect on a pipeline."""
    given = {
        "ema=false": not config.ema,
        "autoencoder": config.autoencoder is not None,
        "model.pretrained": config.model["pretrained"] is not None,
        "allow": bool(config.allow),
    }
    for option, is_given in given.items():
        if is_given:
            warn(f"{option} has no effect: checkpoint={config.checkpoint} is a pipeline.")
