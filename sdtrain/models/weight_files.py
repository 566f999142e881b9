"""Find the safetensors of a network in a folder of diffusers' or transformers' layout.

Does not import torch.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

DIFFUSERS = "diffusion_pytorch_model"
"""Stem of weight files of diffusers."""
TRANSFORMERS = "model"
"""Stem of weight files of transformers."""

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


def find_weight_files(
    folder: Path, stem: str, variants: Sequence[str | None] = VARIANTS
) -> WeightFiles | None:
    """Return the weight files of the first variant that is complete; None if there is none.

    stem: DIFFUSERS or TRANSFORMERS.
    """
    for variant in variants:
        whole = folder / weight_file_name(stem, variant)
        if whole.is_file():
            return WeightFiles((whole,), None, variant)
        index = folder / _index_name(stem, variant)
        parts = _listed_parts(index)
        if parts:
            return WeightFiles(parts, index, variant)
    return None


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
