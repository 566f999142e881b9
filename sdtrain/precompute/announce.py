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
    """

    count: int
    size: int
    seconds: float

    @classmethod
    def measure(cls, encoder: Encoder, missing: list[Wanted], dtype: type) -> "Announcement":
        """Encode black pictures of the first size, and extrapolate by the number of pixels."""
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
        pixels = 0
        for picture in missing:
            pixels += picture.size[0] * picture.size[1] * (1 + picture.has_twin)
        times = pixels / (height * width)
        size = times * moments.size * np.dtype(dtype).itemsize
        return cls(len(missing), round(size), times * seconds)

    def line(self, total: int, folder: Path) -> str:
        """Return a line for the user. total: pictures of the data set."""
        return (
            f"Cache: {self.count:,} of {total:,} pictures are encoded now "
            f"({self.size / 1e6:,.3g} MB, {format_duration(self.seconds)}) in {folder}"
        )


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
