"""Encode pictures, and add the moments of their latents to a store."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sdtrain.data.folder_state import Stamp
from sdtrain.data.reader import ChangedFileError, Source
from sdtrain.data.split import PictureSplit, too_many_broken_error
from sdtrain.precompute.contents import Contents
from sdtrain.precompute.pictures import (
    Loaded,
    PictureLoader,
    Wanted,
    batch_size,
    keys_of,
)
from sdtrain.precompute.sharing import Batch, SharedWork
from sdtrain.precompute.store import Store

Request = tuple[str, list[tuple[Wanted, bytes | None]]]
"""(name of the batch, [(picture, SHA-256 of its file, or None if it is not known)])."""


class Encoder:
    """Runs an autoencoder on batches of one size.

    A smaller batch is filled up with copies of its last picture: what becomes of a picture depends,
    by its rounding, on the size of the batch. So it does not matter which pictures were missing.

    Args:
        autoencoder: on the device and in eval mode.
        device: of the autoencoder.
    """

    def __init__(self, autoencoder: nn.Module, device: torch.device) -> None:
        self.autoencoder = autoencoder
        self.device = device

    def __call__(self, images: Tensor) -> np.ndarray:
        """Return moments [N, 2, C, h, w], float32, of pictures [N, 3, H, W] in [-1, 1]."""
        height, width = images.shape[-2:]
        size = batch_size((width, height), self.device)
        parts = []
        for part in images.split(size):
            filler = part[-1:].expand(size - len(part), -1, -1, -1)
            filled = torch.cat([part, filler]) if len(filler) else part
            parts.append(self.run(filled)[: len(part)])
        return np.concatenate(parts)

    def run(self, images: Tensor) -> np.ndarray:
        """Return the moments of one batch as it is."""
        with torch.inference_mode():
            return self.autoencoder.moments(images.to(self.device)).float().cpu().numpy()


@dataclass
class PictureCache:
    """The moments of pictures in a store, and what is known about the pictures' files.

    splits: by name. source: of their pictures' files. contents: the hashes of the files. digests:
    {name: SHA-256} of those that are known. problems: {name: what is wrong} of the pictures that
    cannot be read. max_skipped: how many these may be; None: none.
    """

    store: Store
    splits: Mapping[str, PictureSplit]
    source: Source
    contents: Contents
    max_skipped: int | None = None
    digests: dict[str, bytes] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)

    def look_up(self, wanted: Iterable[Wanted]) -> None:
        """Find the hashes of the files of pictures that are known."""
        unknown = [each.name for each in wanted if each.name not in self.digests]
        if unknown:
            self.digests |= self.contents.known(self.source.stamps(unknown))

    def keys(self, wanted: Wanted) -> list[bytes]:
        """Return the keys of a picture and its twin; [] if the hash of its file is not known."""
        digest = self.digests.get(wanted.name)
        return [] if digest is None else keys_of(wanted, self.splits[wanted.split], digest)

    def missing_moments(self, wanted: Wanted) -> int:
        """Return how many of the moments of a picture and its twin are not in the store.

        0 if it cannot be read; all of them if the hash of its file is not known.
        """
        if wanted.name in self.problems:
            return 0
        keys = self.keys(wanted)
        if not keys:
            return 1 + wanted.has_twin
        return sum(key not in self.store.shards for key in keys)

    def is_certainly_missing(self, wanted: Wanted) -> bool:
        """Whether a picture that is missing will still be when its file has been hashed."""
        return bool(self.keys(wanted)) or not self.store.shards.shards

    def missing_in(self, batch: Batch) -> list[Wanted]:
        """Return the pictures of a batch that are missing, after what others have added."""
        self.store.shards.refresh()
        self.look_up(batch.items)
        return [picture for picture in batch.items if self.missing_moments(picture)]

    def note(self, loaded: Loaded) -> None:
        """Remember the hash of a picture's file, or what is wrong with it. Raises DataError."""
        if loaded.error is None:
            self.digests[loaded.wanted.name] = loaded.digest
            return
        if self.max_skipped is None or isinstance(loaded.error, ChangedFileError):
            raise loaded.error
        self.problems[loaded.wanted.name] = loaded.error.problem
        if len(self.problems) > self.max_skipped:
            raise too_many_broken_error(str(loaded.error), self.max_skipped)


def _as_it_is(loaded: tuple[str, list[Loaded]]) -> tuple[str, list[Loaded]]:
    """Return what the data set returned: by default a loader would convert its tuples to lists."""
    return loaded


class _Requests:
    """The sampler of a loader: claims a batch whenever the loader, which reads ahead, asks for the
    next.
    """

    def __init__(self, cache: PictureCache, work: SharedWork) -> None:
        self.cache = cache
        self.work = work

    def __iter__(self) -> Iterator[Request]:
        digests = self.cache.digests
        while batch := self.work.claim_next():
            yield batch.name, [(picture, digests.get(picture.name)) for picture in batch.items]


@dataclass
class Encoding:
    """Encodes what is missing in a cache, together with other processes that do the same.

    Args:
        cache: its store is open for writing.
        encoder: of the pictures.
        num_workers: processes that read pictures ahead.
        set_up_worker: called in each of them.
        encoded: called after each batch with its number of pictures and their moments, None if
            nothing had to be encoded.
        waiting: called with the number of pictures that other processes have left.
    """

    cache: PictureCache
    encoder: Encoder
    num_workers: int
    set_up_worker: Callable[[int], None] | None
    encoded: Callable[[int, np.ndarray | None], None]
    waiting: Callable[[int], None]
    _hashed: dict[str, tuple[Stamp, bytes]] = field(default_factory=dict)

    def run(self, batches: list[Batch]) -> None:
        """Return once nothing is missing in the batches.

        Raises DataError for a picture that cannot be read, StorageError if the store cannot be
        written; what was written before stays.
        """
        work = SharedWork(self.cache.store.claims, batches, self.cache.missing_in)
        while work.is_left:
            self._encode_claimed(work)
            work.wait_for_others(self.waiting)

    def _encode_claimed(self, work: SharedWork) -> None:
        """Encode and write all batches that this process can claim."""
        loader = DataLoader(
            PictureLoader(self.cache.splits, self.cache.store.shards.__contains__),
            batch_size=None,
            collate_fn=_as_it_is,
            sampler=_Requests(self.cache, work),
            num_workers=self.num_workers,
            worker_init_fn=self.set_up_worker,
        )
        for name, pictures in loader:
            moments = self._encode(pictures)
            work.note_computed(name)
            self.encoded(len(pictures), moments)
            if self.cache.store.is_due:
                self._write(work)
        self._write(work)

    def _encode(self, pictures: list[Loaded]) -> np.ndarray | None:
        """Encode the pictures that can be read, and add them to the store."""
        for loaded in pictures:
            self.cache.note(loaded)
            if loaded.stamp is not None:
                self._hashed[loaded.wanted.name] = (loaded.stamp, loaded.digest)
        readable = [loaded for loaded in pictures if loaded.images is not None]
        if not readable:
            return None
        images = np.concatenate([loaded.images for loaded in readable])
        moments = self.encoder(torch.from_numpy(images))
        place = 0
        for loaded in readable:
            for key, pixels in zip(self.cache.keys(loaded.wanted), loaded.pixels, strict=True):
                self.cache.store.add(key, moments[place], pixels)
                place += 1
        return moments

    def _write(self, work: SharedWork) -> None:
        """Write the moments, then the hashes of the files, and give up the claims."""
        self.cache.store.flush()
        self.cache.contents.add(self._hashed)
        self._hashed.clear()
        work.release_computed()
