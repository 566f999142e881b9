"""Read the configuration files of a Stable Diffusion pipeline in diffusers' layout.

Does not import torch.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdtrain.errors import UserError
from sdtrain.models.autoencoder_folder import AutoencoderFolder, read_autoencoder_folder
from sdtrain.weight_files import DIFFUSERS, TRANSFORMERS, find_weight_files, weight_file_name

KEY = "model.pretrained"

INDEX = "model_index.json"
UNET = "unet"
TEXT_ENCODER = "text_encoder"
TOKENIZER = "tokenizer"
VAE = "vae"
SCHEDULER = "scheduler"

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
    "StableDiffusionInpaint": "the mask and the picture that its UNet reads",
    "StableDiffusionDepth2Img": "the depth map that its UNet reads",
}
"""{beginning of a pipeline's class name: what sdtrain lacks for it}."""


@dataclass(frozen=True)
class PipelineFolder:
    """The configuration files of a pipeline.

    path: the folder with model_index.json. unet, text_encoder, scheduler: contents of their
    configuration files, the first two with the defaults of their classes.
    """

    path: Path
    unet: dict[str, Any]
    text_encoder: dict[str, Any]
    scheduler: dict[str, Any]
    autoencoder: AutoencoderFolder

    @property
    def image_size(self) -> int | None:
        """Side of the pictures that the UNet was trained on, in pixels; None if it is unknown."""
        side = self.unet["sample_size"]
        return side * self.autoencoder.downsampling if isinstance(side, int) else None


def read_pipeline_folder(path: Path, source: str, variant: str | None) -> PipelineFolder:
    """Read and check the configuration files in a folder.

    source: the folder as the user named it, for messages. variant: of the weight files. Raises
    UserError if there is no such pipeline, or its parts do not fit together.
    """
    _check_class(path, source)
    for subfolder in (*STEMS, TOKENIZER, SCHEDULER):
        if not (path / subfolder).is_dir():
            raise _pipeline_error(source, f"its subfolder {subfolder}/ is missing")
    for subfolder, stem in STEMS.items():
        _check_weights(path / subfolder, stem, source, variant)
    _check_tokenizer(path / TOKENIZER, source)
    unet = _read_network_config(path, UNET, source)
    text_encoder = _read_network_config(path, TEXT_ENCODER, source)
    scheduler = _read_json(path / SCHEDULER / "scheduler_config.json", source)
    autoencoder = read_autoencoder_folder(str(path / VAE), variant)
    pipeline = PipelineFolder(path, unet, text_encoder, scheduler, autoencoder)
    _check_fit(pipeline, source)
    return pipeline


def _check_class(path: Path, source: str) -> None:
    """Raise UserError if the folder holds no pipeline, or one of another architecture."""
    if path.is_file():
        raise UserError(
            "is a file; sdtrain reads a folder in diffusers' layout",
            key=KEY,
            value=source,
            remedy="Convert it once with diffusers: "
            "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER).",
        )
    if not (path / INDEX).is_file():
        raise _pipeline_error(source, f"{INDEX} is missing")
    name = str(_read_json(path / INDEX, source).get("_class_name"))
    for beginning, lacking in UNSUPPORTED.items():
        if name.startswith(beginning):
            raise UserError(
                f"is a {name}, which sdtrain cannot train: it lacks {lacking}",
                key=KEY,
                value=source,
                remedy="Give a StableDiffusionPipeline, such as Stable Diffusion 1.5 or 2.1.",
            )


def _read_network_config(path: Path, subfolder: str, source: str) -> dict[str, Any]:
    """Return a network's config.json with the defaults of its class."""
    config = _read_json(path / subfolder / "config.json", source)
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
    in_one = (folder / "tokenizer.json").is_file()
    in_two = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    if not in_one and not in_two:
        reason = f"{TOKENIZER}/tokenizer.json, or vocab.json and merges.txt, are missing"
        raise _pipeline_error(source, reason)


def _read_json(file: Path, source: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        name = f"{file.parent.name}/{file.name}"
        raise _pipeline_error(source, f"{name} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise _pipeline_error(source, f"{file.parent.name}/{file.name} is not a JSON object")
    return content


def _check_fit(pipeline: PipelineFolder, source: str) -> None:
    """Raise UserError if text encoder, UNet and autoencoder do not fit together."""
    width = pipeline.text_encoder["hidden_size"]
    attended = pipeline.unet["cross_attention_dim"]
    if width != attended:
        raise _pipeline_error(
            source,
            f"its text encoder has width {width} (hidden_size), but its UNet attends to width "
            f"{attended} (cross_attention_dim)",
        )
    latent_channels = pipeline.autoencoder.latent_channels
    for name in ("in_channels", "out_channels"):
        channels = pipeline.unet[name]
        if channels != latent_channels:
            raise _pipeline_error(
                source,
                f"its UNet has {name}={channels}, but its autoencoder has "
                f"latent_channels={latent_channels}",
            )


def _check_weights(folder: Path, stem: str, source: str, variant: str | None) -> None:
    """Raise UserError if there are no complete safetensors."""
    if find_weight_files(folder, stem, variant) is not None:
        return
    reason = f"{folder.name}/{weight_file_name(stem, variant)} is missing"
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
