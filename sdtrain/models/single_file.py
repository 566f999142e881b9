"""Convert a single safetensors file in the original layout of Stable Diffusion to a folder.

Does not import torch, unless it has to convert.
"""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from sdtrain.console import warn
from sdtrain.errors import StorageError, UserError
from sdtrain.files import set_modes
from sdtrain.models.original_names import (
    AUTOENCODER_PREFIX,
    CLIP_PREFIX,
    OPEN_CLIP_PREFIX,
    UNET_PREFIX,
    autoencoder_names,
    text_encoder_names,
    unet_names,
)
from sdtrain.models.pipeline_folder import INDEX, KEY, TOKENIZER
from sdtrain.paths import shipped_folder
from sdtrain.weight_files import quiet_libraries, read_header

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

CONFIGURATIONS = "stable_diffusion"
"""Folder of sdtrain's data with the configurations of Stable Diffusion."""

VERSIONS = {768: "v1", 1024: "v2"}
"""{width of the text that the UNet attends to: subfolder of CONFIGURATIONS}."""

PADDING = {"v1": "<|endoftext|>", "v2": "!"}
"""{version: the token with which its captions are padded}."""

OTHER_ARCHITECTURES = {
    "conditioner.embedders.": "Stable Diffusion XL",
    "joint_blocks.": "Stable Diffusion 3",
    "double_blocks.": "Flux",
    "control_model.": "a ControlNet",
    "lora_": "a LoRA",
    ".lora": "a LoRA",
}
"""{part of a weight's name: the architecture that it belongs to}."""

NETWORKS = {
    "UNet": (UNET_PREFIX,),
    "autoencoder": (AUTOENCODER_PREFIX,),
    "text encoder": (CLIP_PREFIX, OPEN_CLIP_PREFIX),
}
"""{network: prefixes of its weights}."""


def convert_single_file(file: Path) -> Path:
    """Return a pipeline's folder with the weights of a single file.

    The folder is in the user's cache, where it is written once. The configuration is that of the
    file's folder, if it holds a pipeline, or else that of Stable Diffusion 1.5 or 2.1, by the width
    of the text. Raises UserError if the file is none of these.
    """
    shapes = _read_shapes(file)
    _check_networks(shapes, file)
    configuration = _configuration(shapes, file)
    folder = cache_folder() / f"{file.stem}-{_key(file, configuration)}"
    if not (folder / INDEX).is_file():
        _convert(file, configuration, folder, shapes)
    return folder


def cache_folder() -> Path:
    """Return the folder of converted files, as XDG_CACHE_HOME says."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "sdtrain" / "converted"


def _read_shapes(file: Path) -> dict[str, list[int]]:
    """Return {name: shape} of the file's weights."""
    if file.suffix != ".safetensors":
        raise _file_error(
            file, f"is a {file.suffix or 'file'}, and no safetensors; pickles are not read"
        )
    try:
        return {name: each["shape"] for name, each in read_header(file).items()}
    except ValueError as error:
        raise _file_error(file, str(error)) from error


def _check_networks(shapes: dict[str, list[int]], file: Path) -> None:
    """Raise UserError unless the file holds the three networks of a Stable Diffusion pipeline."""
    for part, architecture in OTHER_ARCHITECTURES.items():
        if any(part in name for name in shapes):
            raise _file_error(file, f"holds {architecture}, which sdtrain cannot train")
    for network, prefixes in NETWORKS.items():
        if not any(name.startswith(prefixes) for name in shapes):
            raise _file_error(file, f"holds no {network} ({prefixes[0]}*)")
    channels = shapes.get(f"{UNET_PREFIX}input_blocks.0.0.weight", [0, 0])[1]
    if channels != 4:
        raise _file_error(
            file,
            f"holds a UNet with {channels} input channels, not 4, as models for inpainting and "
            "depth have",
        )


def _configuration(shapes: dict[str, list[int]], file: Path) -> Path:
    """Return the folder whose configuration the file's networks have."""
    if (file.parent / INDEX).is_file():
        return file.parent
    widths = {shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")}
    if len(widths) != 1 or not widths <= VERSIONS.keys():
        raise _file_error(
            file,
            f"holds a UNet that attends to text of width {sorted(widths)}; Stable Diffusion 1.x "
            f"has 768 and 2.x 1024, and there is no {INDEX} beside it with another configuration",
        )
    return shipped_folder("data", "README.md") / CONFIGURATIONS / VERSIONS[widths.pop()]


def _key(file: Path, configuration: Path) -> str:
    """Return a key of a file, as it is now, and its configuration."""
    status = file.stat()
    digest = hashlib.sha256(f"{file.resolve()} {status.st_size} {status.st_mtime_ns}".encode())
    for path in sorted(configuration.rglob("*.json")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _convert(file: Path, configuration: Path, folder: Path, shapes: dict[str, list[int]]) -> None:
    """Write the pipeline in `file` to `folder`, all or nothing."""
    warn(f"{file} is converted to {folder}, which later runs read.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".", suffix=".tmp") as scratch:
            described = Path(scratch) / "configuration"
            copy_configuration(configuration, described)
            converted = Path(scratch) / "pipeline"
            with quiet_libraries():
                pipeline = _read(file, described)
                _check_weights(pipeline, shapes, file)
                pipeline.save_pretrained(converted, safe_serialization=True)
            set_modes(converted)
            converted.rename(folder)
    except OSError as error:
        if (folder / INDEX).is_file():  # another process was faster
            return
        raise StorageError(
            f"{folder} cannot be written: {error.strerror or error}",
            key=KEY,
            remedy="Free space, or set XDG_CACHE_HOME to another folder.",
        ) from error


def copy_configuration(configuration: Path, target: Path) -> None:
    """Copy the configuration files to `target`, with CLIP's tokenizer if they have none."""

    def weights(folder: str, names: list[str]) -> set[str]:
        return {name for name in names if name.endswith((".safetensors", ".bin", ".ckpt", ".pt"))}

    shutil.copytree(configuration, target, ignore=weights)
    if not (target / TOKENIZER).is_dir():
        shutil.copytree(configuration.parent / TOKENIZER, target / TOKENIZER)
        settings = target / TOKENIZER / "tokenizer_config.json"
        content = json.loads(settings.read_text(encoding="utf-8"))
        content["pad_token"] = PADDING[configuration.name]
        settings.write_text(json.dumps(content), encoding="utf-8")


def _read(file: Path, configuration: Path) -> "StableDiffusionPipeline":
    """Read the pipeline with diffusers. Raises UserError."""
    from diffusers import StableDiffusionPipeline

    try:
        return StableDiffusionPipeline.from_single_file(
            str(file), config=str(configuration), local_files_only=True, safety_checker=None
        )
    except Exception as error:  # diffusers raises various classes for files that do not match
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise _file_error(file, f"does not match its configuration: {first_line}") from error


def _check_weights(
    pipeline: "StableDiffusionPipeline", shapes: dict[str, list[int]], file: Path
) -> None:
    """Raise UserError if a weight is not in the file: diffusers leaves it at a random value."""
    unet = pipeline.unet
    autoencoder = pipeline.vae
    text_encoder = pipeline.text_encoder
    originals = (
        unet_names(unet.state_dict(), unet.config),
        autoencoder_names(autoencoder.state_dict(), autoencoder.config),
        text_encoder_names(text_encoder.state_dict(), text_encoder.config.hidden_size),
    )
    missing = []
    for names in originals:
        missing += [name for name in names.values() if name not in shapes]
    if missing:
        raise _file_error(file, f"lacks {len(missing)} weights, such as {missing[0]}")


def _file_error(file: Path, reason: str) -> UserError:
    return UserError(
        reason,
        key=KEY,
        value=str(file),
        remedy=f"Set {KEY} to a safetensors file of Stable Diffusion 1.x or 2.x, or to a folder in "
        "diffusers' layout.",
    )
