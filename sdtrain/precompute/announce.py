"""Say how large a cache will be and how long it will take, before it is made."""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sdtrain.console import format_duration, warn
from sdtrain.errors import StorageError
from sdtrain.precompute.latents import Encoder, PictureCache
from sdtrain.precompute.pictures import Wanted, batch_size

FAST = 0.5
"""A whole batch is timed only if one picture takes fewer seconds; otherwise the first picture's
time is taken."""

SPARE = 1.02
"""Bytes on the disk for one byte of moments: keys, checksums and the last block of each file."""


@dataclass(frozen=True)
class Announcement:
    """What is going to be encoded.

    count: of pictures. size: of their moments that are missing, in bytes. seconds: to encode them
    in this process. certain_size: of the moments that are known to be missing. The others may turn
    out to be in the cache when their files have been hashed.
    """

    count: int
    size: int
    seconds: float
    certain_size: int

    @classmethod
    def measure(
        cls, encoder: Encoder, cache: PictureCache, missing: list[Wanted]
    ) -> "Announcement":
        """Encode black pictures of the first size, and extrapolate by the number of pixels.

        missing: the pictures of which moments are missing.
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
        bytes_a_pixel = moments.size * np.dtype(cache.store.dtype).itemsize / (height * width)
        encoded_pixels = missing_pixels = certain_pixels = 0
        for picture in missing:
            pixels = picture.size[0] * picture.size[1]
            # A twin is encoded with its picture, even if only one of them is missing.
            encoded_pixels += pixels * (1 + picture.has_twin)
            pixels *= cache.missing_moments(picture)
            missing_pixels += pixels
            if cache.is_certainly_missing(picture):
                certain_pixels += pixels
        return cls(
            count=len(missing),
            size=round(missing_pixels * bytes_a_pixel),
            seconds=encoded_pixels / (height * width) * seconds,
            certain_size=round(certain_pixels * bytes_a_pixel),
        )

    def line(self, total: int, folder: Path) -> str:
        """Return a line for the user. total: pictures of the data set."""
        most = "" if self.certain_size == self.size else "up to "
        return (
            f"Cache: {most}{self.count:,} of {total:,} pictures are encoded now "
            f"({most}{self.size / 1e6:,.3g} MB, {format_duration(self.seconds)}) in {folder}"
        )


def check_space(folder: Path, needed: int, at_most: int) -> None:
    """Raise StorageError if the disk of a folder, which need not exist, has no room for `needed`
    bytes, and print a warning if it has none for `at_most` bytes.
    """
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        free = shutil.disk_usage(existing).free
    except OSError:  # a folder that cannot be looked into is reported when it is written
        return
    has = f"in {folder}, whose disk has {free / 1e6:,.1f} MB left"
    remedy = (
        "Free space, set data.cache to a folder on another disk, or cache.dtype=fp16, "
        "which halves it."
    )
    if needed * SPARE > free:
        problem = f"The cache needs {needed * SPARE / 1e6:,.1f} MB {has}"
        raise StorageError(problem, key="data.cache", remedy=remedy)
    if at_most * SPARE > free:
        warn(f"The cache needs up to {at_most * SPARE / 1e6:,.1f} MB {has}. {remedy}")
