"""Convert a single safetensors file in the original layout of Stable Diffusion to a folder.

Does not import torch, unless it has to convert.
"""

import hashlib
import json
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from sdtrain.console import warn
from sdtrain.errors import StorageError, UserError, first_line
from sdtrain.files import flush_files, set_modes, sha256_of, write_text
from sdtrain.models.original_names import (
    AUTOENCODER_PREFIX,
    CLIP_PREFIX,
    OPEN_CLIP_PREFIX,
    OPEN_CLIP_WIDTH,
    UNET_PREFIX,
    autoencoder_names,
    text_encoder_names,
    unet_names,
)
from sdtrain.models.pipeline_folder import (
    INDEX,
    KEY,
    SCHEDULER,
    TEXT_ENCODER,
    TOKENIZER,
    UNET,
    VAE,
    has_vocabulary,
    read_pipeline_folder,
)
from sdtrain.paths import cache_folder, shipped_folder
from sdtrain.weight_files import quiet_libraries, read_header

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

CONFIGURATIONS = "stable_diffusion"
"""Folder of sdtrain's data with the configurations of Stable Diffusion."""

VERSIONS = {768: "v1", OPEN_CLIP_WIDTH: "v2"}
"""{width of the text that the UNet attends to: subfolder of CONFIGURATIONS}."""

PADDING_OF_OPEN_CLIP = "!"
"""Token with which Stable Diffusion 2.x pads captions; 1.x pads with the end of the text."""

LONGEST_CONVERSION = 24 * 3600
"""Seconds after which a conversion that has not ended was killed."""

LONGEST_NAME = 100
"""How many characters of a file's name its cached folder has."""

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

CONFIGURATION_FILES = (
    INDEX,
    f"{UNET}/config.json",
    f"{VAE}/config.json",
    f"{TEXT_ENCODER}/config.json",
    f"{SCHEDULER}/scheduler_config.json",
)
"""Files of a pipeline that describe it."""


def convert_single_file(file: Path) -> Path:
    """Return a pipeline's folder with the weights of a single file.

    The folder is in the user's cache, where it is written once for each content of the file. The
    configuration is that of the file's folder, if it holds a pipeline, or else that of Stable
    Diffusion 1.5 or 2.1, by the width of the text. Raises UserError if the file is none of these.
    """
    try:
        shapes = _read_shapes(file)
        _check_networks(shapes, file)
        configuration = _configuration(shapes, file)
        name = f"{file.stem[:LONGEST_NAME]}-{_key(file, configuration)}"
    except OSError as error:
        raise _file_error(file, f"cannot be read: {error.strerror or error}") from error
    folder = cache_folder() / "converted" / name
    if not _is_whole(folder):
        _convert(file, configuration, folder, shapes)
    return folder


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
    shape = shapes.get(f"{UNET_PREFIX}input_blocks.0.0.weight", [])
    channels = shape[1] if len(shape) == 4 else 0
    if channels != 4:
        raise _file_error(
            file,
            f"holds a UNet with {channels} input channels, not 4, as models for inpainting and "
            "depth have",
        )


def _configuration(shapes: dict[str, list[int]], file: Path) -> Path:
    """Return the folder whose configuration the file's networks have."""
    if (file.parent / INDEX).is_file():
        for name in CONFIGURATION_FILES:
            if not (file.parent / name).is_file():
                raise _file_error(file, f"has {INDEX} beside it, but no {name}")
        return file.parent
    widths = {shape[-1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")}
    if len(widths) != 1 or not widths <= VERSIONS.keys():
        raise _file_error(
            file,
            f"holds a UNet that attends to text of width {sorted(widths)}; Stable Diffusion 1.x "
            f"has 768 and 2.x 1024, and there is no {INDEX} beside it with another configuration",
        )
    return _shipped() / VERSIONS[widths.pop()]


def _shipped() -> Path:
    return shipped_folder("data", "README.md") / CONFIGURATIONS


def shipped_tokenizer() -> Path:
    """Return the folder of CLIP's tokenizer."""
    return _shipped() / TOKENIZER


def _described_files(configuration: Path) -> list[tuple[Path, str]]:
    """Return (file, name in the pipeline) of all configuration files, tokenizer included.

    The tokenizer is CLIP's, as it ships with sdtrain, if the configuration has none.
    """
    files = [(configuration / name, name) for name in CONFIGURATION_FILES]
    tokenizer = configuration / TOKENIZER
    if not has_vocabulary(tokenizer):
        tokenizer = shipped_tokenizer()
    for path in sorted([*tokenizer.glob("*.json"), *tokenizer.glob("*.txt")]):
        files.append((path, f"{TOKENIZER}/{path.name}"))
    return files


def _key(file: Path, configuration: Path) -> str:
    """Return a key of the contents of a file and of its configuration."""
    digest = hashlib.sha256(_remembered_sha256(file).encode())
    for path, name in _described_files(configuration):
        digest.update(f"{name} {sha256_of(path)}".encode())
    return digest.hexdigest()[:16]


def _remembered_sha256(file: Path) -> str:
    """Return the hash of a file, which is computed once for its place, size and time."""
    status = file.stat()
    place = f"{file.resolve()} {status.st_size} {status.st_mtime_ns}"
    memory = cache_folder() / "hashes" / hashlib.sha256(place.encode()).hexdigest()[:32]
    if memory.is_file():
        return memory.read_text(encoding="utf-8").strip()
    digest = sha256_of(file)
    memory.parent.mkdir(parents=True, exist_ok=True)
    write_text(memory, digest)
    return digest


def _is_whole(folder: Path) -> bool:
    """Whether a converted pipeline is complete."""
    try:
        read_pipeline_folder(folder, str(folder), None)
    except UserError:
        return False
    return True


def _convert(file: Path, configuration: Path, folder: Path, shapes: dict[str, list[int]]) -> None:
    """Write the pipeline in `file` to `folder`, all or nothing."""
    warn(f"{file} is converted to {folder}, which later runs read.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_old_scratch(folder.parent)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".", suffix=".tmp") as scratch:
            described = Path(scratch) / "configuration"
            copy_configuration(configuration, described)
            converted = Path(scratch) / "pipeline"
            with quiet_libraries():
                pipeline = _read(file, described)
                _check_weights(pipeline, shapes, file)
                pipeline.save_pretrained(converted, safe_serialization=True)
            set_modes(converted)
            flush_files(converted)
            if _is_whole(folder):  # another process was faster
                return
            shutil.rmtree(folder, ignore_errors=True)
            converted.rename(folder)
    except (OSError, SafetensorError) as error:
        if _is_whole(folder):
            return
        raise StorageError(
            f"{folder} cannot be written: {getattr(error, 'strerror', None) or error}",
            key=KEY,
            remedy="Free space, or set XDG_CACHE_HOME to another folder.",
        ) from error


def _remove_old_scratch(folder: Path) -> None:
    """Remove what killed conversions have left in the folder. Others may be under way."""
    for scratch in folder.glob(".*.tmp"):
        with suppress(OSError):
            if time.time() - scratch.stat().st_mtime > LONGEST_CONVERSION:
                shutil.rmtree(scratch)


def copy_configuration(configuration: Path, target: Path) -> None:
    """Copy a pipeline's configuration files, with the tokenizer padding as its version does."""
    for path, name in _described_files(configuration):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / name)
    if has_vocabulary(configuration / TOKENIZER):
        return
    text_encoder = json.loads((target / TEXT_ENCODER / "config.json").read_text(encoding="utf-8"))
    if text_encoder.get("hidden_size") == OPEN_CLIP_WIDTH:
        settings = target / TOKENIZER / "tokenizer_config.json"
        content = json.loads(settings.read_text(encoding="utf-8"))
        content["pad_token"] = PADDING_OF_OPEN_CLIP
        settings.write_text(json.dumps(content), encoding="utf-8")


def _read(file: Path, configuration: Path) -> "StableDiffusionPipeline":
    """Read the pipeline with diffusers. Raises UserError."""
    from diffusers import StableDiffusionPipeline

    try:
        return StableDiffusionPipeline.from_single_file(
            str(file),
            config=str(configuration),
            local_files_only=True,
            safety_checker=None,
            # Without memory, which is the default with accelerate, a missing weight is an error
            # that does not name it.
            low_cpu_mem_usage=False,
        )
    except Exception as error:  # diffusers raises various classes for files that do not match
        reason = f"does not match its configuration: {first_line(error)}"
        raise _file_error(file, reason) from error


def _check_weights(
    pipeline: "StableDiffusionPipeline", shapes: dict[str, list[int]], file: Path
) -> None:
    """Raise UserError unless the file's weights are those of its configuration.

    diffusers leaves a missing weight at a random value, and ignores others of the UNet.
    """
    unet = pipeline.unet
    autoencoder = pipeline.vae
    text_encoder = pipeline.text_encoder
    wanted = {
        *unet_names(unet.state_dict(), unet.config).values(),
        *autoencoder_names(autoencoder.state_dict(), autoencoder.config).values(),
        *text_encoder_names(text_encoder.state_dict(), text_encoder.config.hidden_size).values(),
    }
    missing = sorted(wanted - shapes.keys())
    if missing:
        raise _file_error(file, f"lacks {len(missing)} weights, such as {missing[0]}")
    of_unet = {name for name in shapes if name.startswith(UNET_PREFIX)}
    surplus = sorted(of_unet - wanted)
    if surplus:
        raise _file_error(
            file, f"holds {len(surplus)} weights that its UNet does not have, such as {surplus[0]}"
        )


def _file_error(file: Path, reason: str) -> UserError:
    return UserError(
        reason,
        key=KEY,
        value=str(file),
        remedy=f"Set {KEY} to a safetensors file of Stable Diffusion 1.x or 2.x, or to a folder in "
        "diffusers' layout.",
    )
