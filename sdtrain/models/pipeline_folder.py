"""Read the configuration files of a Stable Diffusion pipeline in diffusers' layout.

Does not import torch.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdtrain.errors import UserError
from sdtrain.models.autoencoder_folder import AutoencoderFolder, read_autoencoder_folder
from sdtrain.weight_files import (
    DIFFUSERS,
    TRANSFORMERS,
    find_weight_files,
    read_header,
    weight_file_name,
)

KEY = "model.pretrained"

INDEX = "model_index.json"
UNET = "unet"
TEXT_ENCODER = "text_encoder"
TOKENIZER = "tokenizer"
VAE = "vae"
SCHEDULER = "scheduler"
DEPTH_ESTIMATOR = "depth_estimator"
FEATURE_EXTRACTOR = "feature_extractor"

STEMS = {UNET: DIFFUSERS, TEXT_ENCODER: TRANSFORMERS, VAE: DIFFUSERS}
"""{subfolder with weights: stem of its weight files}."""

CLASSES = {UNET: "UNet2DConditionModel", TEXT_ENCODER: "CLIPTextModel"}
"""{subfolder: the class of its network}."""

DEFAULTS = {
    UNET: {"in_channels": 4, "out_channels": 4, "sample_size": None, "cross_attention_dim": 1280},
    TEXT_ENCODER: {"hidden_size": 512, "max_position_embeddings": 77},
}
"""Values of keys that a config.json may leave out."""

UNSUPPORTED = {
    "StableDiffusionXL": "its second text encoder and its size conditioning",
    "StableDiffusion3": "its transformer and its three text encoders",
    "Flux": "its transformer and its T5 text encoder",
    "PixArt": "its transformer",
    "StableCascade": "its prior",
    "StableDiffusionUpscale": "the low-resolution picture that its UNet reads",
}
"""{beginning of a pipeline's class name: what sdtrain lacks for it}."""


@dataclass(frozen=True)
class Architecture:
    """The configuration files of a pipeline's networks and scheduler.

    unet, text_encoder, scheduler: their contents, the first two with the defaults of their classes.
    """

    unet: dict[str, Any]
    text_encoder: dict[str, Any]
    scheduler: dict[str, Any]


@dataclass(frozen=True)
class PipelineFolder(Architecture):
    """The configuration files of a pipeline that holds weights. autoencoder: files of its VAE."""

    autoencoder: AutoencoderFolder


def is_pipeline(path: Path) -> bool:
    """Whether a path is a pipeline: a folder in diffusers' layout, or a single safetensors file."""
    return (path / INDEX).is_file() or (path.is_file() and path.suffix == ".safetensors")


def has_vocabulary(tokenizer: Path) -> bool:
    """Whether a tokenizer's folder holds its vocabulary."""
    in_two = (tokenizer / "vocab.json").is_file() and (tokenizer / "merges.txt").is_file()
    return in_two or (tokenizer / "tokenizer.json").is_file()


def read_architecture(path: Path, source: str) -> Architecture:
    """Read the configuration files in a folder, which need not hold weights.

    source: the folder as the user named it, for messages. Raises UserError if there are none.
    """
    for subfolder in (UNET, TEXT_ENCODER, SCHEDULER):
        if not (path / subfolder).is_dir():
            raise _pipeline_error(source, f"its subfolder {subfolder}/ is missing")
    return Architecture(
        unet=_read_network_config(path / UNET, source),
        text_encoder=_read_network_config(path / TEXT_ENCODER, source),
        scheduler=read_json(path / SCHEDULER / "scheduler_config.json", source),
    )


def read_pipeline_folder(path: Path, source: str, variant: str | None) -> PipelineFolder:
    """Read and check the configuration files of a pipeline with weights.

    source: the folder as the user named it, for messages. variant: of the weight files. Raises
    UserError if there is no such pipeline, or its parts do not fit together.
    """
    check_class(path, source)
    for subfolder in (*STEMS, TOKENIZER, SCHEDULER):
        if not (path / subfolder).is_dir():
            raise _pipeline_error(source, f"its subfolder {subfolder}/ is missing")
    for subfolder, stem in STEMS.items():
        _check_weights(path / subfolder, stem, source, variant)
    _check_tokenizer(path / TOKENIZER, source)
    architecture = read_architecture(path, source)
    autoencoder = read_autoencoder_folder(str(path / VAE), variant)
    pipeline = PipelineFolder(**vars(architecture), autoencoder=autoencoder)
    check_fit(pipeline.unet, pipeline, source)
    return pipeline


def check_class(path: Path, source: str) -> None:
    """Raise UserError if the folder holds no pipeline, or one of another architecture."""
    if not (path / INDEX).is_file():
        raise _pipeline_error(source, f"{INDEX} is missing")
    name = str(read_json(path / INDEX, source).get("_class_name"))
    for beginning, lacking in UNSUPPORTED.items():
        if name.startswith(beginning):
            raise UserError(
                f"is a {name}, which sdtrain cannot train: it lacks {lacking}",
                key=KEY,
                value=source,
                remedy="Give a StableDiffusionPipeline, such as Stable Diffusion 1.5 or 2.1.",
            )


def _read_network_config(folder: Path, source: str) -> dict[str, Any]:
    """Return a network's config.json with the defaults of its class.

    folder: the pipeline's UNET or TEXT_ENCODER.
    """
    subfolder = folder.name
    config = read_json(folder / "config.json", source)
    name = config.get("_class_name") or (config.get("architectures") or [None])[0]
    expected = CLASSES[subfolder]
    if name != expected:
        raise _pipeline_error(source, f"{subfolder}/config.json is of class {name}, not {expected}")
    config = DEFAULTS[subfolder] | config
    for key in DEFAULTS[subfolder]:
        is_optional = key == "sample_size"
        if type(config[key]) is not int and not is_optional:
            raise _pipeline_error(source, f"{subfolder}/config.json has {key}={config[key]!r}")
    return config


def _check_tokenizer(folder: Path, source: str) -> None:
    """Raise UserError if the vocabulary is missing: transformers would make an empty one."""
    if not has_vocabulary(folder):
        reason = f"{TOKENIZER}/tokenizer.json, or vocab.json and merges.txt, are missing"
        raise _pipeline_error(source, reason)


def read_json(file: Path, source: str) -> dict[str, Any]:
    """Return the contents of a configuration file. Raises UserError, which names the source."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        name = f"{file.parent.name}/{file.name}"
        raise _pipeline_error(source, f"{name} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise _pipeline_error(source, f"{file.parent.name}/{file.name} is not a JSON object")
    return content


def check_fit(unet: dict[str, Any], pipeline: PipelineFolder, source: str) -> None:
    """Raise UserError if a UNet does not fit a pipeline's text encoder and autoencoder.

    unet: its config.json, see `Architecture`.
    """
    width = pipeline.text_encoder["hidden_size"]
    attended = unet["cross_attention_dim"]
    if width != attended:
        raise _pipeline_error(
            source,
            f"its text encoder has width {width} (hidden_size), but the UNet attends to width "
            f"{attended} (cross_attention_dim)",
        )
    latent_channels = pipeline.autoencoder.latent_channels
    with_condition = [latent_channels, *_channels_with_condition(latent_channels).values()]
    for name, allowed in (("in_channels", with_condition), ("out_channels", [latent_channels])):
        channels = unet[name]
        if channels not in allowed:
            raise _pipeline_error(
                source,
                f"the UNet has {name}={channels}, but its autoencoder has "
                f"latent_channels={latent_channels}",
            )


def _channels_with_condition(latent_channels: int) -> dict[str, int]:
    """Return {condition: input channels of a UNet that reads it beside the latents}."""
    # One depth map; a mask and the latents of the masked picture.
    return {"depth": latent_channels + 1, "inpainting": 2 * latent_channels + 1}


def channel_condition_of(pipeline: PipelineFolder) -> str | None:
    """Return what the UNet of a pipeline reads beside the latents: "depth", "inpainting" or None.

    The names are those of configs/model/channels.
    """
    counts = _channels_with_condition(pipeline.autoencoder.latent_channels)
    for name, channels in counts.items():
        if pipeline.unet["in_channels"] == channels:
            return name
    return None


def _check_weights(folder: Path, stem: str, source: str, variant: str | None) -> None:
    """Raise UserError if there are no complete safetensors."""
    files = find_weight_files(folder, stem, variant)
    if files is not None:
        for path in files.paths:
            try:
                read_header(path)
            except ValueError as error:
                raise _pipeline_error(source, f"{folder.name}/{path.name} {error}") from error
        return
    reason = f"{folder.name}/{weight_file_name(stem, variant)} is missing"
    singles = sorted(path.name for path in folder.parent.glob("*.safetensors"))
    if singles:
        reason += f" (its {singles[0]} may hold all weights: name that file)"
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    if pickled:
        reason += f"; {pickled[0]} is a pickle, which may run any code and is not read"
    elif (folder / f"{stem}.safetensors.index.json").is_file():
        reason += ", and of the files that its index lists some are missing: perhaps a download "
        reason += "was interrupted"
    raise _pipeline_error(source, reason)


def _pipeline_error(source: str, reason: str) -> UserError:
    return UserError(
        f"holds no Stable Diffusion pipeline that can be read: {reason}",
        key=KEY,
        value=source,
        remedy=f"Set {KEY} to another folder.",
    )
