"""Write a trained model as a Stable Diffusion pipeline in diffusers' layout."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionDepth2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from sdtrain.conditioning.depth import Depth
from sdtrain.conditioning.inpainting import Inpainting
from sdtrain.errors import StorageError, UserError
from sdtrain.export.scheduler import scheduler_of
from sdtrain.export.single_file import original_state, write_single_file
from sdtrain.files import check_writable, set_modes
from sdtrain.latent_diffusion import LatentDiffusion
from sdtrain.weight_files import TRANSFORMERS, weight_file_name

TEXT_PREFIX = "text_model."
"""Prefix of a text encoder's weights in Stable Diffusion's own files, which other tools expect."""

Pipeline = (
    StableDiffusionPipeline | StableDiffusionDepth2ImgPipeline | StableDiffusionInpaintPipeline
)

PIPELINES: dict[tuple[type, ...], type[Pipeline]] = {
    (): StableDiffusionPipeline,
    (Depth,): StableDiffusionDepth2ImgPipeline,
    (Inpainting,): StableDiffusionInpaintPipeline,
}
"""{classes of the channel conditions: class of the pipeline}."""

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def build_pipeline(model: LatentDiffusion, image_size: int) -> Pipeline:
    """Return the model's parts as a pipeline that reads the same conditions.

    The parts are changed: sizes in their configurations are set, and layers that are not read are
    removed.

    Raises UserError for a part that has no counterpart in a pipeline.
    """
    unet: UNet2DConditionModel = _network(model.unet, UNet2DConditionModel, "model.unet")
    text_encoder = _network(model.conditioner, CLIPTextModel, "model.conditioner")
    autoencoder: AutoencoderKL = _network(model.autoencoder, AutoencoderKL, "model.autoencoder")
    _remove_skipped_layers(model.conditioner)
    if getattr(model.autoencoder, "latent_shift", False):
        raise _part_error("model.autoencoder", "a shift of its latents")
    scheduler = scheduler_of(model.objective.schedule, model.objective.prediction)
    if image_size % 8:
        raise UserError(
            f"The run cannot be exported: its pictures have {image_size} pixels a side, and a "
            "Stable Diffusion pipeline draws multiples of 8 only",
            key="checkpoint",
            remedy="Train with a data.image_size that is a multiple of 8.",
        )
    tokenizer: CLIPTokenizer = model.conditioner.tokenizer
    tokenizer.model_max_length = model.conditioner.max_length
    latent_side = model.autoencoder.latent_shape(image_size)[-1]
    unet.register_to_config(sample_size=latent_side)
    autoencoder.register_to_config(
        scaling_factor=model.autoencoder.latent_scale, sample_size=image_size
    )
    for network in (unet, autoencoder):
        network.register_to_config(_name_or_path="")  # a path of this machine
    parts = {
        "vae": autoencoder,
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        "unet": unet,
        "scheduler": scheduler,
        "feature_extractor": None,
    }
    kind = pipeline_class(model)
    if kind is StableDiffusionDepth2ImgPipeline:
        return kind(**parts, depth_estimator=None)
    return kind(**parts, safety_checker=None, requires_safety_checker=False)


def pipeline_class(model: LatentDiffusion) -> type[Pipeline]:
    """Return the class of pipelines whose UNet reads the model's conditions.

    Raises UserError if there is none.
    """
    if model.conditioner.channels:
        raise _part_error("model.conditioner", "input channels of the UNet")
    kinds = tuple(type(condition) for condition in model.channels.values())
    if kinds not in PIPELINES:
        raise _part_error("model.channels", ", ".join(model.channels))
    return PIPELINES[kinds]


def write_pipeline(
    pipeline: StableDiffusionPipeline, folder: Path, dtype: str, *, single_file: bool
) -> None:
    """Write a pipeline into an empty folder, its model_index.json last.

    dtype: "fp32" or "fp16", of the weights in the files. single_file: whether the weights are
    written to one file in Stable Diffusion's original layout. Raises UserError if they cannot, and
    StorageError if nothing can be written.
    """
    pipeline.to(dtype=DTYPES[dtype])
    state = original_state(pipeline) if single_file else None
    check_writable(folder)
    try:
        if state is not None:
            write_single_file(pipeline, state, folder)
        else:
            pipeline.save_pretrained(folder, safe_serialization=True)
            _add_text_prefix(folder / "text_encoder" / weight_file_name(TRANSFORMERS, None))
        set_modes(folder)
    except (OSError, SafetensorError) as error:
        (folder / "model_index.json").unlink(missing_ok=True)
        raise StorageError(
            f"{folder} cannot be written: {getattr(error, 'strerror', None) or error}",
            key="output",
            remedy="If the disk is full, free space; then set output to a new folder.",
        ) from error


def _network(part: nn.Module, kind: type[nn.Module], key: str) -> Any:
    """Return the network of diffusers or transformers in a part of the model."""
    network = getattr(part, "net", None)
    if not isinstance(network, kind):
        raise _part_error(key, type(part).__name__)
    return network


def _remove_skipped_layers(conditioner: nn.Module) -> None:
    """Remove the last layers of the text encoder that `clip_skip` leaves out, because a pipeline
    does not store that number.
    """
    clip_skip = getattr(conditioner, "clip_skip", 0)
    if clip_skip:
        network: CLIPTextModel = conditioner.net
        network.encoder.layers = network.encoder.layers[:-clip_skip]
        network.config.num_hidden_layers -= clip_skip


def _add_text_prefix(file: Path) -> None:
    """Give every weight of the text encoder the prefix of Stable Diffusion's own files."""
    prefixed = {}
    for name, value in load_file(file).items():
        prefixed[name if name.startswith(TEXT_PREFIX) else f"{TEXT_PREFIX}{name}"] = value
    save_file(prefixed, file, metadata={"format": "pt"})


def _part_error(key: str, what: str) -> UserError:
    return UserError(
        f"The run cannot be exported: {key} has {what}, which a Stable Diffusion pipeline lacks",
        key="checkpoint",
        remedy="Export a model with diffusers' UNet and autoencoder and a CLIP text encoder.",
    )
