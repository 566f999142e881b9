"""Make what is cached of a data set complete, and return the data set with it."""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import nn

from sdtrain.conditioning.interface import Conditioner
from sdtrain.config.cache_keys import AUTO, KEY, NO_CACHE, drawn_error, random_crop_error
from sdtrain.data.cached import CachedContexts, CachedData, CachedMoments
from sdtrain.data.reader import PictureReader
from sdtrain.data.shards import MISSING
from sdtrain.data.split import PictureSplit
from sdtrain.errors import UserError
from sdtrain.models.modes import eval_mode
from sdtrain.paths import cache_folder
from sdtrain.precompute.announce import Announcement, check_space
from sdtrain.precompute.contents import Contents
from sdtrain.precompute.latents import Encoder, Encoding, PictureCache
from sdtrain.precompute.pictures import Wanted, batches, wanted_pictures
from sdtrain.precompute.progress import progress_bar
from sdtrain.precompute.sharing import Batch
from sdtrain.precompute.store import Store, measure_rounding
from sdtrain.precompute.texts import (
    TextEncoding,
    cached_contexts,
    captions_to_cache,
    why_texts_are_not_cached,
)
from sdtrain.types import PictureData, extras_of

SPLITS = ("train", "validation")

Identity = dict[str, Any]
"""Everything that a network's results depend on, beside its input: {name: plain value}."""


@dataclass(frozen=True)
class CacheRequest:
    """What is cached and how.

    folder: data.cache, "auto" or a folder. dtype: cache.dtype. autoencoder, conditioner: their
    identities. num_workers: processes that read pictures ahead. device: of the networks.
    is_checked_whole: whether the checksums of all shards are compared first; otherwise each is
    compared when it is first read. console: where lines and bars are printed. set_up_worker: called
    in each worker. check_signals: called after each batch; raises to stop.
    """

    folder: str
    dtype: str
    autoencoder: Identity
    conditioner: Identity
    num_workers: int
    device: torch.device
    console: Console
    is_checked_whole: bool = False
    set_up_worker: Callable[[int], None] | None = None
    check_signals: Callable[[], None] = lambda: None

    def store(self, kind: str, identity: Identity) -> Store:
        """Return the store of a kind, "latents" or "texts". Raises StorageError."""
        if self.folder != AUTO:
            return Store(Path(self.folder) / kind, identity, self.dtype)
        text = json.dumps([identity, self.dtype], sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()[:16]
        return Store(cache_folder() / kind / key, identity, self.dtype)

    @property
    def contents(self) -> Path:
        """The file with the hashes of pictures' files."""
        folder = cache_folder() if self.folder == AUTO else Path(self.folder)
        return folder / "contents.sqlite"


def check_cacheable(data: PictureData, autoencoder: nn.Module) -> None:
    """Raise UserError if the pictures of a data set, or what an autoencoder makes of them, have no
    cached form.
    """
    for name in SPLITS:
        split = data.split(name)
        # A user's own data set may read its pictures in another way, which no key would know.
        if not isinstance(split, PictureSplit) or not isinstance(split.reader, PictureReader):
            raise drawn_error(type(data).__name__)
        if split.transform.crop == "random":
            raise random_crop_error()
    if not hasattr(autoencoder, "moments"):
        raise UserError(
            f"{type(autoencoder).__name__} has no method `moments`, whose results are cached",
            key=KEY,
            remedy=f"{NO_CACHE} Or write the method, as sdtrain/models/autoencoder.py has it.",
        )


def with_cache(
    data: PictureData, autoencoder: nn.Module, conditioner: Conditioner, request: CacheRequest
) -> CachedData:
    """Compute what is missing in the cache, and return the data set with what is cached.

    Raises UserError if it has no cached form, StorageError for a cache that cannot be used or
    written, DataError for a picture that cannot be read.
    """
    check_cacheable(data, autoencoder)
    splits = {name: data.split(name) for name in SPLITS}
    store = request.store("latents", request.autoencoder)
    if request.is_checked_whole:
        store.remove_changed()
    source = next(iter(splits.values())).reader.source
    cache = PictureCache(
        store=store,
        splits=splits,
        source=source,
        contents=Contents(request.contents, source.identity),
        max_skipped=extras_of(data).max_skipped,
    )
    contexts = _cache_texts(splits, conditioner, request)
    wanted = wanted_pictures(splits, source)
    source.check_unchanged([picture.name for picture in wanted])
    cache.look_up(wanted)
    _cache_pictures(cache, wanted, autoencoder, request)
    cached = {}
    for name, split in splits.items():
        moments = _moments_of(cache, split, [each for each in wanted if each.split == name])
        cached[name] = split.with_cache(moments, contexts)
    return CachedData(data=data, splits=cached, contexts=contexts)


def _cache_pictures(
    cache: PictureCache, wanted: list[Wanted], autoencoder: nn.Module, request: CacheRequest
) -> None:
    """Encode the pictures that are missing."""
    incomplete = []
    missing = []
    for batch in batches(wanted, request.device):
        of_batch = [picture for picture in batch.items if cache.missing_moments(picture)]
        if of_batch:
            incomplete.append(batch)
            missing += of_batch
    console = request.console
    folder = cache.store.folder
    if not missing:
        console.print(f"Cache: all {len(wanted):,} pictures are in {folder}.", soft_wrap=True)
        return
    with _in_use(autoencoder, request.device):
        encoder = Encoder(autoencoder, request.device)
        announcement = Announcement.measure(encoder, cache, missing)
        check_space(folder, announcement.certain_size, announcement.size)
        cache.store.open_for_writing()
        try:
            console.print(announcement.line(len(wanted), folder), soft_wrap=True)
            _encode(cache, incomplete, encoder, request, total=len(missing))
        finally:
            cache.store.close()


@contextmanager
def _in_use(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Have a network on a device and in eval mode in the block, and on the CPU afterwards."""
    network.to(device)
    try:
        with eval_mode(network):
            yield
    finally:
        network.to("cpu")


def _encode(
    cache: PictureCache,
    incomplete: list[Batch],
    encoder: Encoder,
    request: CacheRequest,
    *,
    total: int,
) -> None:
    is_first = True
    with progress_bar(request.console, total, "pictures") as bar:

        def encoded(count: int, moments: np.ndarray | None) -> None:
            nonlocal is_first
            bar.advance(count)
            if is_first and moments is not None and request.dtype != "fp32":
                request.console.print(_rounding_line(moments, request.dtype), soft_wrap=True)
                is_first = False
            request.check_signals()

        Encoding(
            cache=cache,
            encoder=encoder,
            num_workers=request.num_workers,
            set_up_worker=request.set_up_worker,
            encoded=encoded,
            waiting=bar.wait(request.check_signals),
        ).run(incomplete)


def _rounding_line(moments: np.ndarray, dtype: str) -> str:
    largest, mean = measure_rounding(moments, dtype)
    spread = float(moments[:, 0].std())
    return (
        f"cache.dtype={dtype} changes the moments of the first {len(moments)} pictures by up to "
        f"{largest:.2g}, {mean:.2g} on average; the latents have a standard deviation of "
        f"{spread:.3g}."
    )


def _moments_of(cache: PictureCache, split: PictureSplit, wanted: list[Wanted]) -> CachedMoments:
    """Return the moments of a split by index."""
    keys: dict[str, list[bytes]] = {}
    for picture in wanted:
        if picture.name not in cache.problems:
            keys[picture.name] = cache.keys(picture)
    names = split.names
    places = np.full((len(names), 2, 2), MISSING, dtype=np.int32)
    for twin in (0, 1):
        of_twin = []
        for name in names:
            of_name = keys.get(name, [])
            of_twin.append(of_name[twin] if twin < len(of_name) else None)
        places[:, twin] = cache.store.shards.places(of_twin)
    problems = {}
    for index, name in enumerate(names):
        if name in cache.problems:
            problems[index] = cache.problems[name]
    return CachedMoments(shards=cache.store.shards.shards, places=places, problems=problems)


def _cache_texts(
    splits: dict[str, PictureSplit], conditioner: Conditioner, request: CacheRequest
) -> CachedContexts | None:
    """Encode the captions that are missing, and return the contexts; None if they have none."""
    why_not = why_texts_are_not_cached(conditioner, splits)
    if why_not is not None:
        if why_not:
            request.console.print(f"Cache: no captions, because {why_not}.", soft_wrap=True)
        return None
    store = request.store("texts", request.conditioner)
    if request.is_checked_whole:
        store.remove_changed()
    captions = captions_to_cache(splits)
    encoding = TextEncoding(store, conditioner, request.device)
    missing = encoding.missing_in(Batch("", captions))
    if missing:
        _encode_texts(encoding, captions, request, total=len(missing))
    else:
        line = f"Cache: all {len(captions):,} captions are in {store.folder}."
        request.console.print(line, soft_wrap=True)
    return cached_contexts(store, captions)


def _encode_texts(
    encoding: TextEncoding, captions: list[str], request: CacheRequest, *, total: int
) -> None:
    store = encoding.store
    with _in_use(encoding.conditioner, request.device):
        size = total * encoding.bytes_each(store.dtype)
        check_space(store.folder, size, size)
        store.open_for_writing()
        try:
            megabytes = f"{size / 1e6:,.3g} MB"
            line = f"Cache: {total:,} of {len(captions):,} captions ({megabytes}) in {store.folder}"
            request.console.print(line, soft_wrap=True)
            with progress_bar(request.console, total, "captions") as bar:

                def encoded(count: int) -> None:
                    bar.advance(count)
                    request.check_signals()

                encoding.run(captions, encoded, bar.wait(request.check_signals))
        finally:
            store.close()
