"""Say how large a cache will be and how long it will take, before it is made."""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sdtrain.console import format_duration
from sdtrain.errors import StorageError
from sdtrain.precompute.latents import Encoder
from sdtrain.precompute.pictures import Wanted, batch_size

FAST = 0.5
"""A whole batch is timed only if one picture takes fewer seconds; otherwise the first picture's
time is taken."""

SPARE = 1.02
"""Bytes on the disk for one byte of moments: keys, checksums and the last block of each file."""


@dataclass(frozen=True)
class Announcement:
    """What is going to be encoded.

    count: of pictures. size: of their moments, in bytes. seconds: to encode them in this process.
    certain_size: of those of them that are known to be missing. The others may turn out to be in
    the cache when their files have been hashed.
    """

    count: int
    size: int
    seconds: float
    certain_size: int

    @classmethod
    def measure(
        cls, encoder: Encoder, missing: list[Wanted], certain: list[Wanted], dtype: type
    ) -> "Announcement":
        """Encode black pictures of the first size, and extrapolate by the number of pixels.

        certain: those of the missing pictures that are known to be missing.
        """
        width, height = missing[0].size
        black = torch.zeros(1, 3, height, width)
        began = time.monotonic()
        moments = encoder.run(black)
        seconds = time.monotonic() - began
        if seconds < FAST:
            many = black.expand(batch_size((width, height), encoder.device), -1, -1, -1)
            began = time.monotonic()
            encoder.run(many)
            seconds = (time.monotonic() - began) / len(many)
        bytes_each = moments.size * np.dtype(dtype).itemsize
        times = _pixels(missing) / (height * width)
        certain_times = _pixels(certain) / (height * width)
        return cls(
            count=len(missing),
            size=round(times * bytes_each),
            seconds=times * seconds,
            certain_size=round(certain_times * bytes_each),
        )

    def line(self, total: int, folder: Path) -> str:
        """Return a line for the user. total: pictures of the data set."""
        most = "" if self.certain_size == self.size else "up to "
        return (
            f"Cache: {most}{self.count:,} of {total:,} pictures are encoded now "
            f"({most}{self.size / 1e6:,.3g} MB, {format_duration(self.seconds)}) in {folder}"
        )


def _pixels(pictures: list[Wanted]) -> int:
    """Return how many the autoencoder sees of these pictures and their twins."""
    pixels = 0
    for picture in pictures:
        pixels += picture.size[0] * picture.size[1] * (1 + picture.has_twin)
    return pixels


def check_space(folder: Path, size: int) -> None:
    """Raise StorageError if the disk of a folder, which need not exist, has no room for `size`
    bytes.
    """
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        free = shutil.disk_usage(existing).free
    except OSError:  # a folder that cannot be looked into is reported when it is written
        return
    if size * SPARE > free:
        raise StorageError(
            f"The cache needs {size * SPARE / 1e6:,.1f} MB in {folder}, whose disk has "
            f"{free / 1e6:,.1f} MB left",
            key="data.cache",
            remedy="Free space, set data.cache to a folder on another disk, or cache.dtype=fp16, "
            "which halves it.",
        )
