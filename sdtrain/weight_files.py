"""Find the safetensors of a network in a folder of diffusers' or transformers' layout.

Does not import torch; `quiet_libraries` imports both libraries.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sdtrain.errors import UserError, first_line

DIFFUSERS = "diffusion_pytorch_model"
"""Stem of weight files of diffusers."""
TRANSFORMERS = "model"
"""Stem of weight files of transformers."""

FROZEN_DTYPES = {None: "float32", "fp16": "float16", "bf16": "bfloat16"}
"""{model.frozen_dtype: name of the type in torch}."""

VARIANTS = (None, "fp16", "bf16")
"""Variants in the names of weight files, None for full precision. The first that exists is read."""


@dataclass(frozen=True)
class WeightFiles:
    """The weight files of one network.

    paths: one file, or the parts that an index lists. index: that index, or None. variant: one of
    VARIANTS.
    """

    paths: tuple[Path, ...]
    index: Path | None
    variant: str | None

    @property
    def files(self) -> list[Path]:
        """All files that are read."""
        return [*self.paths, self.index] if self.index else list(self.paths)

    @property
    def sha256(self) -> str:
        """Hash of the single file, or of the names and hashes of several."""
        digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in self.paths]
        if len(digests) == 1:
            return digests[0]
        of_all = hashlib.sha256()
        for path, digest in zip(self.paths, digests, strict=True):
            of_all.update(f"{path.name} {digest}\n".encode())
        return of_all.hexdigest()


def find_weight_files(folder: Path, stem: str, variant: str | None = None) -> WeightFiles | None:
    """Return the weight files of a variant, or of the first of VARIANTS that is complete; None if
    there are none.

    stem: DIFFUSERS or TRANSFORMERS.
    """
    for name in VARIANTS if variant is None else (variant,):
        whole = folder / weight_file_name(stem, name)
        if whole.is_file():
            return WeightFiles((whole,), None, name)
        index = folder / _index_name(stem, name)
        parts = _listed_parts(index)
        if parts:
            return WeightFiles(parts, index, name)
    return None


def require_weight_files(folder: Path, stem: str, key: str, variant: str | None) -> WeightFiles:
    """Return what `find_weight_files` finds. Raises UserError, which names `key`, if it is None."""
    files = find_weight_files(folder, stem, variant)
    if files is None:
        raise UserError(
            f"has no {weight_file_name(stem, variant)}",
            key=key,
            value=str(folder),
            remedy="Set model.pretrained to a folder with these weights, or change model.variant.",
        )
    return files


def read_header(file: Path) -> dict[str, dict]:
    """Return {name: {"dtype", "shape", "data_offsets"}} of the tensors in a safetensors file.

    Raises ValueError, which says what the file is or lacks, if it is none or is incomplete.
    """
    size = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or 8 + length > size:
            raise ValueError("is no safetensors file, or an incomplete one")
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise ValueError("is no safetensors file") from error
    try:
        header.pop("__metadata__", None)
        ends = []
        for each in header.values():
            ends.append(each["data_offsets"][1])
            list(each["shape"])  # must be one
        end = 8 + length + max(ends, default=0)
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        raise ValueError("is no safetensors file") from error
    if size < end:
        raise ValueError(
            f"is incomplete: it has {size:,} of {end:,} bytes; perhaps a download was interrupted"
        )
    return header


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Let diffusers and transformers draw no progress bar and print no advice in the block."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    verbosities = [library.get_verbosity() for library in libraries]
    drew_bars = [library.is_progress_bar_enabled() for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, verbosity, drew_bar in zip(libraries, verbosities, drew_bars, strict=True):
            library.set_verbosity(verbosity)
            if drew_bar:
                library.enable_progress_bar()


def check_loaded(info: dict, key: str, folder: Path) -> None:
    """Raise UserError if `from_pretrained` reports missing weights, or some of another shape."""
    missing = sorted(info["missing_keys"])
    if missing:
        raise weights_error(key, folder, f"{len(missing)} are missing, such as {missing[0]}")
    if info["mismatched_keys"]:
        name = str(sorted(info["mismatched_keys"])[0][0])
        raise weights_error(key, folder, f"{name} has another shape")


def weights_error(key: str, folder: Path, reason: object) -> UserError:
    """Return the error for weights that do not match the config.json beside them."""
    return UserError(
        f"has weights that do not match its config.json: {first_line(reason)}",
        key=key,
        value=str(folder),
        remedy="Download the folder again, or set model.pretrained to another one.",
    )


def weight_file_name(stem: str, variant: str | None) -> str:
    """Return the name of the file that holds all weights."""
    return f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors"


def _index_name(stem: str, variant: str | None) -> str:
    middle = f".{variant}" if variant else ""
    return f"{stem}.safetensors.index{middle}.json"


def _listed_parts(index: Path) -> tuple[Path, ...]:
    """Return the files that an index lists; () if there is no index, or one of them is missing."""
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        parts = tuple(index.parent / Path(name).name for name in sorted(set(listed)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ()
    return parts if all(map(Path.is_file, parts)) else ()
