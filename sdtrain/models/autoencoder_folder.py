"""Read an autoencoder's folder in diffusers' layout: config.json and the weight files.

Does not import torch.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sdtrain.errors import UserError
from sdtrain.paths import find_folder

KEY = "model.autoencoder.path"
CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
VARIANTS = (None, "fp16", "bf16")
"""Variants in the names of weight files of diffusers, None for full precision. The first that
exists is read."""


@dataclass(frozen=True)
class AutoencoderFolder:
    """The files of an autoencoder.

    path: the folder with config.json. config: its contents, with diffusers' defaults. weights: the
    weight files. variant: one of VARIANTS.
    """

    path: Path
    config: dict[str, Any]
    weights: tuple[Path, ...]
    variant: str | None

    @property
    def files(self) -> list[Path]:
        """All files that are read."""
        files = [self.path / CONFIG, *self.weights]
        index = self.path / _index_name(self.variant)
        if index.is_file():
            files.append(index)
        return files

    @property
    def latent_channels(self) -> int:
        return self.config["latent_channels"]

    @property
    def downsampling(self) -> int:
        """Side of a picture over side of its latents: each block after the first halves it."""
        return 2 ** (len(self.config["block_out_channels"]) - 1)

    @cached_property
    def sha256(self) -> str:
        """Hash of the weights: of the single file, or of the names and hashes of several."""
        digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in self.weights]
        if len(digests) == 1:
            return digests[0]
        of_all = hashlib.sha256()
        for path, digest in zip(self.weights, digests, strict=True):
            of_all.update(f"{path.name} {digest}\n".encode())
        return of_all.hexdigest()

    @property
    def config_sha256(self) -> str:
        """Hash of the configuration, without diffusers' private keys."""
        public = {key: value for key, value in self.config.items() if not key.startswith("_")}
        return hashlib.sha256(json.dumps(public, sort_keys=True).encode()).hexdigest()


def read_autoencoder_folder(path: str) -> AutoencoderFolder:
    """Read the autoencoder in a folder, or in the subfolder vae/ of a pipeline's folder.

    Raises UserError if there is none.
    """
    folder = find_folder(path, KEY)
    if not (folder / CONFIG).is_file() and (folder / "vae").is_dir():
        folder = folder / "vae"
    if not (folder / CONFIG).is_file():
        raise _no_autoencoder(path, f"{CONFIG}, or vae/{CONFIG} of a pipeline, is missing")
    config = _read_config(folder / CONFIG, path)
    for variant in VARIANTS:
        weights = _weights(folder, variant)
        if weights:
            return AutoencoderFolder(folder, config, weights, variant)
    names = " or ".join(map(_file_name, VARIANTS))
    raise _no_autoencoder(path, f"{names} is missing beside its {CONFIG}")


def _read_config(file: Path, path: str) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _no_autoencoder(path, f"its {CONFIG} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise _no_autoencoder(path, f"its {CONFIG} is not a JSON object")
    class_name = config.get("_class_name", "AutoencoderKL")
    if class_name != "AutoencoderKL":
        raise _no_autoencoder(path, f"its {CONFIG} is of class {class_name}, not AutoencoderKL")
    defaults = {"latent_channels": 4, "block_out_channels": [64], "scaling_factor": 0.18215}
    values = {key: value for key, value in config.items() if value is not None}
    config = defaults | values  # diffusers' defaults for what config.json leaves out
    _check_config(config, path)
    return config


def _check_config(config: dict[str, Any], path: str) -> None:
    """Raise UserError for a bad value among those that are read here."""
    channels = config["latent_channels"]
    blocks = config["block_out_channels"]
    scale = config["scaling_factor"]
    is_valid = {
        "latent_channels": type(channels) is int and channels > 0,
        "block_out_channels": isinstance(blocks, list) and len(blocks) > 0,
        "scaling_factor": type(scale) in (int, float) and scale > 0,
    }
    for name, valid in is_valid.items():
        if not valid:
            raise _no_autoencoder(path, f"its {CONFIG} has {name}={config[name]!r}")


def _weights(folder: Path, variant: str | None) -> tuple[Path, ...]:
    """Return the weight file, or the files that an index lists; () if one of them is missing."""
    whole = folder / _file_name(variant)
    if whole.is_file():
        return (whole,)
    try:
        listed = json.loads((folder / _index_name(variant)).read_text())["weight_map"].values()
        parts = tuple(folder / Path(name).name for name in sorted(set(listed)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ()
    return parts if all(map(Path.is_file, parts)) else ()


def _file_name(variant: str | None) -> str:
    stem, _, suffix = WEIGHTS.rpartition(".")
    return f"{stem}.{variant}.{suffix}" if variant else WEIGHTS


def _index_name(variant: str | None) -> str:
    return f"{WEIGHTS}.index.{variant}.json" if variant else f"{WEIGHTS}.index.json"


def _no_autoencoder(path: str, reason: str) -> UserError:
    return UserError(
        f"holds no autoencoder in diffusers' layout: {reason}",
        key=KEY,
        value=path,
        remedy=f"Set {KEY} to another folder.",
    )
