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
from sdtrain.weight_files import (
    DIFFUSERS,
    VARIANTS,
    WeightFiles,
    find_weight_files,
    weight_file_name,
)

KEY = "model.autoencoder.path"
CONFIG = "config.json"
WEIGHTS = weight_file_name(DIFFUSERS, None)


@dataclass(frozen=True)
class AutoencoderFolder:
    """The files of an autoencoder.

    path: the folder with config.json. config: its contents, with diffusers' defaults.
    """

    path: Path
    config: dict[str, Any]
    weights: WeightFiles

    @property
    def files(self) -> list[Path]:
        """All files that are read."""
        return [self.path / CONFIG, *self.weights.files]

    @property
    def latent_channels(self) -> int:
        return self.config["latent_channels"]

    @property
    def downsampling(self) -> int:
        """Side of a picture over side of its latents: each block after the first halves it."""
        return 2 ** (len(self.config["block_out_channels"]) - 1)

    @cached_property
    def sha256(self) -> str:
        """Hash of the weights."""
        return self.weights.sha256

    @property
    def config_sha256(self) -> str:
        """Hash of the configuration, without diffusers' private keys."""
        public = {key: value for key, value in self.config.items() if not key.startswith("_")}
        return hashlib.sha256(json.dumps(public, sort_keys=True).encode()).hexdigest()


def read_autoencoder_folder(path: str, variant: str | None = None) -> AutoencoderFolder:
    """Read the autoencoder in a folder, or in the subfolder vae/ of a pipeline's folder.

    variant: of the weight files; None takes the first of VARIANTS. Raises UserError if there is no
    autoencoder.
    """
    folder = find_folder(path, KEY)
    if not (folder / CONFIG).is_file() and (folder / "vae").is_dir():
        folder = folder / "vae"
    if not (folder / CONFIG).is_file():
        raise _no_autoencoder(path, f"{CONFIG}, or vae/{CONFIG} of a pipeline, is missing")
    config = _read_config(folder / CONFIG, path)
    weights = find_weight_files(folder, DIFFUSERS, variant)
    if weights is None:
        variants = VARIANTS if variant is None else (variant,)
        names = " or ".join(weight_file_name(DIFFUSERS, each) for each in variants)
        raise _no_autoencoder(path, f"{names} is missing beside its {CONFIG}")
    return AutoencoderFolder(folder, config, weights)


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


def _no_autoencoder(path: str, reason: str) -> UserError:
    return UserError(
        f"holds no autoencoder in diffusers' layout: {reason}",
        key=KEY,
        value=path,
        remedy=f"Set {KEY} to another folder.",
    )
