"""Rows that bring what an autoencoder and a text encoder have computed, in place of pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import fields

import numpy as np
import torch
from torch import Tensor

from sdtrain.data.shards import MISSING, Shard, key_of
from sdtrain.data.split import PictureSplit
from sdtrain.errors import DataError
from sdtrain.types import DataExtras, PictureData, extras_of


class CachedMoments:
    """The moments of a split's pictures, by index. Implements `split.MomentsOf`.

    Args:
        shards: the files.
        places: (number of the shard, row) of each picture and of its mirrored twin, int32
            [N, 2, 2]; MISSING for a twin that is never visited, and for a broken picture.
        problems: {index: what is wrong with a broken picture}.
    """

    def __init__(
        self, *, shards: Sequence[Shard], places: np.ndarray, problems: Mapping[int, str]
    ) -> None:
        self.shards = shards
        self.places = places
        self.problems = problems

    def __call__(self, index: int, is_mirrored: bool) -> tuple[Tensor, bytes]:
        """Return moments [2, C, h, w] and the SHA-256 of the pixels that they were made of.

        Raises DataError for a broken picture, StorageError if the shard is damaged.
        """
        number, row = self.places[index, int(is_mirrored)]
        if number == MISSING:
            raise DataError(self.problems[index], key="data.path")
        shard = self.shards[number]
        return torch.from_numpy(shard.read(row)), shard.pictures[row].tobytes()


class CachedContexts:
    """What a frozen text encoder makes of each caption. Implements `split.ContextOf`.

    Args:
        shards: the files.
        captions: all different ones that a visit may read, and the empty one.
        places: (number of the shard, row) of each, int32 [N, 2].
    """

    def __init__(
        self, *, shards: Sequence[Shard], captions: Sequence[str], places: np.ndarray
    ) -> None:
        self.shards = shards
        # Sorted hashes instead of a dict of texts, because the workers of a loader share arrays
        # and would each copy the texts.
        keys = np.array([key_of(caption=caption) for caption in captions], dtype="S16")
        order = np.argsort(keys)
        self._keys = keys[order]
        self._places = places[order]

    def __call__(self, caption: str) -> Tensor:
        """Return the context [L, D]. Raises StorageError if the shard is damaged."""
        # Through an array, which drops zeros at the end of a key, as that of all keys has.
        key = np.array(key_of(caption=caption), dtype="S16")[()]
        found = int(np.searchsorted(self._keys, key))
        assert self._keys[found] == key, f"a caption that is not cached: {caption!r}"
        number, row = self._places[found]
        return torch.from_numpy(self.shards[number].read(row))


class CachedData:
    """A data set whose rows bring moments, and contexts if they are cached too.

    Has the optional attributes of the data set that it stands for, see `types.DataExtras`.

    Args:
        data: the data set.
        splits: {name: the split with its cache}.
        contexts: of the captions; None if they are not cached.
    """

    def __init__(
        self,
        *,
        data: PictureData,
        splits: Mapping[str, PictureSplit],
        contexts: CachedContexts | None,
    ) -> None:
        self._data = data
        self._splits = dict(splits)
        self.contexts = contexts
        self.image_size = data.image_size
        self.num_classes = data.num_classes
        extras = extras_of(data)
        for field in fields(DataExtras):
            setattr(self, field.name, getattr(extras, field.name))

    def split(self, name: str) -> PictureSplit:
        """Return the split "train" or "validation"."""
        return self._splits[name]

    def example_prompts(self, count: int) -> list[str]:
        """Return `count` training captions, those of the data set."""
        return self._data.example_prompts(count)


def empty_context_of(data: PictureData) -> Tensor | None:
    """Return the context [L, D] of the empty caption; None if no contexts are cached."""
    contexts = getattr(data, "contexts", None)
    return contexts("") if isinstance(contexts, CachedContexts) else None
