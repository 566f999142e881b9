"""An autoencoder's folder in diffusers' layout: what lies in it, and what its config.json says.
Without torch.
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
"""Names under which diffusers writes weights, None for those in full. The first that is there is
read."""


@dataclass(frozen=True)
class AutoencoderFolder:
    """folder: with config.json. config: as it stands there. weights: the files that hold them.
    variant: of VARIANTS.
    """

    folder: Path
    config: dict[str, Any]
    weights: tuple[Path, ...]
    variant: str | None

    @property
    def files(self) -> list[Path]:
        """All that is read of it."""
        index = self.folder / _index_name(self.variant)
        return [self.folder / CONFIG, *self.weights, *([index] if index.is_file() else [])]

    @property
    def latent_channels(self) -> int:
        return self.config["latent_channels"]

    @property
    def downsampling(self) -> int:
        """Each block after the first halves the resolution."""
        return 2 ** (len(self.config["block_out_channels"]) - 1)

    @cached_property
    def sha256(self) -> str:
        """Of the weights: of the file, or of names and hashes of its parts."""
        digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in self.weights]
        if len(digests) == 1:
            return digests[0]
        lines = [f"{path.name} {each}\n" for path, each in zip(self.weights, digests, strict=True)]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    @property
    def config_sha256(self) -> str:
        """Of what config.json says, without diffusers' own remarks."""
        said = {key: value for key, value in self.config.items() if not key.startswith("_")}
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def read_autoencoder_folder(path: str) -> AutoencoderFolder:
    """The autoencoder in a folder, or in the folder vae of a whole pipeline. Raises UserError."""
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
    looked_for = " or ".join(_file_name(variant) for variant in VARIANTS)
    raise _no_autoencoder(path, f"{looked_for} is missing beside its {CONFIG}")


def _read_config(file: Path, path: str) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _no_autoencoder(path, f"its {CONFIG} cannot be read: {error}") from error
    known = {"latent_channels": 4, "block_out_channels": [64], "scaling_factor": 0.18215}
    if (
        not isinstance(config, dict)
        or config.get("_class_name", "AutoencoderKL") != "AutoencoderKL"
    ):
        found = config.get("_class_name") if isinstance(config, dict) else "no object"
        raise _no_autoencoder(path, f"its {CONFIG} is not an AutoencoderKL's, but {found}")
    given = {key: value for key, value in config.items() if value is not None}
    config = known | given  # what diffusers takes where config.json leaves them out
    _check_config(config, path)
    return config


def _check_config(config: dict[str, Any], path: str) -> None:
    """Raises UserError where one of the sizes that are read here is no size."""
    channels = config["latent_channels"]
    blocks = config["block_out_channels"]
    scale = config["scaling_factor"]
    fits = {
        "latent_channels": type(channels) is int and channels > 0,
        "block_out_channels": isinstance(blocks, list) and len(blocks) > 0,
        "scaling_factor": type(scale) in (int, float) and scale > 0,
    }
    for name, is_right in fits.items():
        if not is_right:
            raise _no_autoencoder(path, f"its {CONFIG} says {name}={config[name]!r}")


def _weights(folder: Path, variant: str | None) -> tuple[Path, ...]:
    """The file, or the parts that an index lists; () where not all of it is there."""
    whole = folder / _file_name(variant)
    if whole.is_file():
        return (whole,)
    try:
        listed = json.loads((folder / _index_name(variant)).read_text())["weight_map"].values()
        parts = tuple(folder / Path(name).name for name in sorted(set(listed)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ()
    return parts if all(part.is_file() for part in parts) else ()


def _file_name(variant: str | None) -> str:
    stem, _, suffix = WEIGHTS.rpartition(".")
    return f"{stem}.{variant}.{suffix}" if variant else WEIGHTS


def _index_name(variant: str | None) -> str:
    return f"{WEIGHTS}.index.{variant}.json" if variant else f"{WEIGHTS}.index.json"


def _no_autoencoder(path: str, reason: str) -> UserError:
    return UserError(
        f"holds no autoencoder as diffusers writes it: {reason}",
        key=KEY,
        value=path,
        remedy=f"Give another folder in {KEY}.",
    )
