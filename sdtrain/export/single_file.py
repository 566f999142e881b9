"""Write a pipeline as one safetensors file in the original layout of Stable Diffusion."""

from pathlib import Path

import torch
from diffusers import StableDiffusionDepth2ImgPipeline, StableDiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor

from sdtrain.errors import UserError
from sdtrain.files import atomic_file
from sdtrain.models.original_names import (
    autoencoder_names,
    is_autoencoder_attention,
    text_encoder_names,
    unet_names,
)

FILE = "model.safetensors"


def original_state(pipeline: StableDiffusionPipeline) -> dict[str, Tensor]:
    """Return the weights of a pipeline's networks under their original names.

    Raises UserError for a UNet that the original layout cannot hold, or diffusers not read there.
    """
    if isinstance(pipeline, StableDiffusionDepth2ImgPipeline):
        raise UserError(
            "does not work: diffusers reads no single file of a model with depth maps",
            key="format",
            value="single_file",
            remedy="Set format=folder.",
        )
    unet = pipeline.unet
    autoencoder = pipeline.vae
    text_encoder = pipeline.text_encoder
    width = text_encoder.config.hidden_size
    try:
        of_unet = unet_names(unet.state_dict(), unet.config)
    except ValueError as error:
        raise UserError(
            f"does not work: Stable Diffusion's own layout has no place for the UNet's {error}",
            key="format",
            value="single_file",
            remedy="Set format=folder, or train with model=stable_diffusion, sd15, sd21 or small.",
        ) from error
    of_autoencoder = autoencoder_names(autoencoder.state_dict(), autoencoder.config)
    of_text_encoder = text_encoder_names(text_encoder.state_dict(), width)
    state = {}
    for network, names in (
        (unet, of_unet),
        (autoencoder, of_autoencoder),
        (text_encoder, of_text_encoder),
    ):
        state |= _renamed(network.state_dict(), names)
    return state


def _renamed(state: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """Return weights under other names. Those that get the same name are joined."""
    parts: dict[str, list[Tensor]] = {}
    for name in sorted(state, key=_query_key_value):
        value = state[name]
        original = names[name]
        if is_autoencoder_attention(original):
            value = value[:, :, None, None]
        parts.setdefault(original, []).append(value)
    return {name: torch.cat(values).contiguous() for name, values in parts.items()}


def _query_key_value(name: str) -> int:
    """Return the place of a weight among those that are joined."""
    for place, projection in enumerate(("q_proj", "k_proj", "v_proj")):
        if projection in name:
            return place
    return 0


def write_single_file(
    pipeline: StableDiffusionPipeline, state: dict[str, Tensor], folder: Path
) -> None:
    """Write weights to FILE in an empty folder, and the pipeline's configuration beside it, with
    which diffusers and sdtrain read it. Raises OSError.

    state: as `original_state` returns it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / FILE) as temporary:
        save_file(state, temporary, metadata={"format": "pt"})
    pipeline.unet.save_config(folder / "unet")
    pipeline.vae.save_config(folder / "vae")
    text_config = pipeline.text_encoder.config
    text_config.architectures = [type(pipeline.text_encoder).__name__]
    text_config.save_pretrained(folder / "text_encoder")
    pipeline.tokenizer.save_pretrained(folder / "tokenizer")
    pipeline.scheduler.save_pretrained(folder / "scheduler")
    pipeline.save_config(folder)
