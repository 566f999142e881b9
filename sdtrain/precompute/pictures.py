"""The pictures whose latents are needed, in batches, and how the workers of a loader read them."""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from sdtrain.data.crop import pixels_sha256
from sdtrain.data.folder_state import Stamp
from sdtrain.data.reader import Source
from sdtrain.data.shards import KEY_BYTES, key_of
from sdtrain.data.split import PictureSplit
from sdtrain.errors import DataError
from sdtrain.precompute.sharing import Batch

RESIZE = "shorter side, bicubic, antialias"
"""How `data.crop` scales a picture before it cuts out the middle."""

BATCH_PIXELS = {"cpu": 2**16, "cuda": 2**20}
MOST_IN_BATCH = 64
"""A batch has at most this many pixels, by the kind of device, and pictures. An encoder takes a
thousand bytes and more for each pixel. On a CPU those of 4 pictures of 128 x 128 pixels stay in its
caches: in a batch of 64 each took twice the time."""


class Wanted(NamedTuple):
    """A picture whose latents are needed.

    split: "train" or "validation". name: see `Reader`. size: (width, height) that the autoencoder
    sees. has_twin: whether its mirrored twin is needed too.
    """

    split: str
    name: str
    size: tuple[int, int]
    has_twin: bool


class Loaded(NamedTuple):
    """A picture that was read.

    digest: SHA-256 of its file. stamp: size and time of the file; None if the digest was known.
    images: [1, 3, h, w] in [-1, 1], or [2, 3, h, w] with the mirrored twin; None if it is cached
    already, or broken. pixels: their SHA-256. error: why it is broken, or None.
    """

    wanted: Wanted
    digest: bytes | None = None
    stamp: Stamp | None = None
    images: np.ndarray | None = None
    pixels: tuple[bytes, ...] = ()
    error: DataError | None = None


def wanted_pictures(splits: Mapping[str, PictureSplit], source: Source) -> list[Wanted]:
    """Return the pictures of all splits, each once, in the order in which they are stored."""
    wanted = {}
    for name, split in splits.items():
        square = (split.transform.image_size, split.transform.image_size)
        has_twin = split.transform.flip
        for index, picture in enumerate(split.names):
            wanted[picture] = Wanted(name, picture, split.size_of(index) or square, has_twin)
    stored = getattr(source, "names", None) or sorted(wanted)
    return [wanted[name] for name in stored if name in wanted]


def batch_size(size: tuple[int, int], device: torch.device) -> int:
    """Return how many pictures of this (width, height) are encoded at once."""
    width, height = size
    pixels = BATCH_PIXELS.get(device.type, BATCH_PIXELS["cuda"])
    return max(1, min(MOST_IN_BATCH, pixels // (height * width)))


def batches(wanted: Iterable[Wanted], device: torch.device) -> Iterator[Batch]:
    """Yield the pictures in batches of one size, which depend on the list and the device alone.

    A twin takes a place of its own.
    """
    waiting: dict[tuple, list[Wanted]] = defaultdict(list)
    for picture in wanted:
        alike = waiting[picture.size, picture.has_twin]
        alike.append(picture)
        if len(alike) * (1 + picture.has_twin) >= batch_size(picture.size, device):
            yield _batch(alike)
            alike.clear()
    for alike in waiting.values():
        if alike:
            yield _batch(alike)


def _batch(pictures: list[Wanted]) -> Batch:
    names = "\n".join(picture.name for picture in pictures)
    return Batch(names, tuple(pictures))


def keys_of(wanted: Wanted, split: PictureSplit, digest: bytes) -> list[bytes]:
    """Return the key of a picture's latents, and of those of its twin if it has one.

    digest: SHA-256 of its file.
    """
    background = split.reader.background
    keys = [picture_key(digest, wanted.size, background, False)]
    if wanted.has_twin:
        keys.append(picture_key(digest, wanted.size, background, True))
    return keys


def picture_key(
    digest: bytes, size: tuple[int, int], background: tuple[int, ...], is_mirrored: bool
) -> bytes:
    """Return the key of the latents of one picture.

    digest: SHA-256 of its file. size: (width, height) that the autoencoder sees. background: that
    behind transparent pixels.
    """
    return hashlib.sha256(_recipe(size, background, is_mirrored) + digest).digest()[:KEY_BYTES]


@cache
def _recipe(size: tuple[int, int], background: tuple[int, ...], is_mirrored: bool) -> bytes:
    """Return a hash of all that is done to a picture, the same for many."""
    return key_of(
        size=size,
        crop="center",
        resize=RESIZE,
        background=background,
        mirrored=is_mirrored,
    )


class PictureLoader(Dataset):
    """Reads, hashes and decodes the pictures of a batch, in the workers of a loader.

    Args:
        splits: by name.
        is_cached: whether the latents of a key exist.
    """

    def __init__(
        self, splits: Mapping[str, PictureSplit], is_cached: Callable[[bytes], bool]
    ) -> None:
        self.splits = dict(splits)
        self.is_cached = is_cached

    def __getitem__(
        self, batch: tuple[str, list[tuple[Wanted, bytes | None]]]
    ) -> tuple[str, list[Loaded]]:
        """Return (name, pictures) of (name, [(picture, SHA-256 of its file, None if unknown)])."""
        name, pictures = batch
        loaded = []
        for wanted, digest in pictures:
            try:
                loaded.append(self._load(wanted, digest))
            except DataError as error:
                loaded.append(Loaded(wanted, error=error))
        return name, loaded

    def _load(self, wanted: Wanted, digest: bytes | None) -> Loaded:
        split = self.splits[wanted.split]
        stamp = None
        if digest is None:
            # Before the bytes are read: a file that changes meanwhile is then hashed again.
            stamp = split.reader.source.stamps([wanted.name]).get(wanted.name)
            digest = hashlib.sha256(split.reader.read_bytes(wanted.name)).digest()
            if all(self.is_cached(key) for key in keys_of(wanted, split, digest)):
                return Loaded(wanted, digest, stamp)
        pixels = split.reader(wanted.name, wanted.size)
        image = split.transform.centred(pixels, wanted.size)
        images = [image, image.flip(-1)] if wanted.has_twin else [image]
        hashes = tuple(pixels_sha256(each) for each in images)
        # An array: a loader would open a socket for each tensor that it hands over.
        return Loaded(wanted, digest, stamp, torch.stack(images).numpy(), hashes)
