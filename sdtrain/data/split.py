"""Split real pictures into training and validation, and read the rows of a split."""

import copy
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np
import pyarrow as pa
from torch import Tensor

from sdtrain.data.buckets import Buckets, bucket_notes
from sdtrain.data.crop import Transform
from sdtrain.data.reader import ChangedFileError, Reader
from sdtrain.data.rows import PictureRow, Rows, rows_table
from sdtrain.data.weights import weights_notes
from sdtrain.errors import DataError, UserError
from sdtrain.randomness import KeyedRandom
from sdtrain.types import Row


def check_options(
    *, image_size: int, validation_fraction: float, background: Sequence[int]
) -> None:
    """Raise UserError for a value that is not allowed in any data set of real pictures."""
    if image_size < 1:
        raise option_error("image_size", image_size, "must be at least 1 pixel")
    if not 0 < validation_fraction <= 0.25:
        raise option_error(
            "validation_fraction",
            validation_fraction,
            "must be above 0 and at most 0.25, the largest share that can be held out",
        )
    if len(background) != 3 or not all(0 <= value <= 255 for value in background):
        raise option_error(
            "background", list(background), "must be red, green, blue, each from 0 to 255"
        )


def check_choices(*, missing_captions: str, on_error: str, max_skipped: int) -> None:
    """Raise UserError for a value that no data set with captions allows."""
    if missing_captions not in ("error", "empty"):
        raise option_error("missing_captions", missing_captions, "is none of error, empty")
    if on_error not in ("fail", "skip"):
        raise option_error("on_error", on_error, "is none of fail, skip")
    if max_skipped < 0:
        raise option_error("max_skipped", max_skipped, "must be at least 0")


def option_error(name: str, value: Any, problem: str) -> UserError:
    """Return the error for a data set's argument.

    problem: the rest of a sentence that begins with data.NAME=VALUE.
    """
    key = f"data.{name}"
    return UserError(problem, key=key, value=value, remedy=f"Change {key}.")


def hold_out_count(pictures: int, fraction: float) -> int:
    """Return how many of `pictures` (at least 2) are held out for validation.

    `fraction` of them, but at least 64, at most a quarter, and never none.
    """
    return max(1, min(max(round(pictures * fraction), 64), pictures // 4))


def held_out_notes(pictures: int, fraction: float) -> list[str]:
    """Return one line with the reason if fewer or more pictures are held out than the user set.

    [] if they are as many.

    pictures: their number. fraction: the share that the user set.
    """
    requested = round(pictures * fraction)
    count = hold_out_count(pictures, fraction)
    if count == requested:
        return []
    return [
        f"{count} of {pictures} pictures ({count / pictures:.0%}) are held out for validation, "
        f"instead of the {requested} that data.validation_fraction={fraction:g} asks for: "
        "64 at least, but never more than a quarter of all."
    ]


def hold_out(names: Sequence[str], fraction: float, seed: int) -> set[str]:
    """Return the names held out for validation.

    They have the lowest hashes, keyed by `seed`, so that a new picture moves few others from one
    split to the other.
    """

    def rank(name: str) -> bytes:
        return hashlib.blake2b(f"{seed}/hold_out/{name}".encode(), digest_size=16).digest()

    distinct = sorted(set(names), key=rank)
    return set(distinct[: hold_out_count(len(distinct), fraction)])


def held_out_rows(rows: Sequence[PictureRow], fraction: float, seed: int) -> np.ndarray:
    """Return whether each row is held out for validation, bool [N]. See `hold_out`."""
    held_out = hold_out([row.name for row in rows], fraction, seed)
    return np.array([row.name in held_out for row in rows])


def rows_hash(rows: Iterable[tuple[str, str, str | int]]) -> str:
    """Return the sha256 of the rows in their order: of the text json.dumps(list(rows)).

    A row is (name, caption, what distinguishes the picture from another of the same name).
    """
    digest = hashlib.sha256(b"[")
    before = ""
    for row in rows:
        digest.update(f"{before}{json.dumps(row)}".encode())
        before = ", "
    digest.update(b"]")
    return digest.hexdigest()


def too_many_broken_error(last_reason: str, max_skipped: int) -> DataError:
    """Return the error for a run that met more than `max_skipped` broken pictures.

    last_reason: what is wrong with the last of them, a whole sentence.
    """
    return DataError(
        f"More pictures turned out to be broken during training than may still be left out "
        f"({max_skipped}), or all of a split. The last: {last_reason}",
        key="data.max_skipped",
        remedy="Check the disk and the pictures, or raise data.max_skipped.",
    )


BucketChooser = Callable[[np.ndarray, np.ndarray | None], Buckets]
"""(sizes of the training pictures, their weights or None) -> their buckets."""

CaptionChooser = Callable[[Sequence[str], int], str]
"""(captions of a picture, ordinal of the visit) -> the caption that this visit reads."""

MomentsOf = Callable[[int, bool], tuple[Tensor, bytes]]
"""(index, whether it is mirrored) -> (moments [2, C, h, w], SHA-256 of the pixels).

Raises DataError for a picture that cannot be read.
"""

DepthOf = Callable[[str, tuple[int, int], tuple[int, int]], Tensor]
"""(name, own size of the picture, size to cover) -> its depth map, uint8 [3, h, w]."""

ContextOf = Callable[[str], Tensor]
"""A caption -> what a frozen text encoder makes of it, [L, D]."""


def first_caption(captions: Sequence[str], ordinal: int) -> str:
    """Return the first caption at every visit."""
    return captions[0]


class PictureSplit:
    """One split of a data set of real pictures. Implements `types.Pictures`.

    A picture that cannot be read raises DataError if max_skipped is None. Otherwise another one of
    the split, or of its bucket, replaces it, a pure function of (seed, ordinal, attempt): batches
    stay full and do not depend on the number of workers and ranks, or on a resume.

    Args:
        rows: the pictures.
        reader: returns the pixels of the picture with this name, uint8 [3, h, w].
        transform: turns pixels into a square, or into the size of their bucket.
        choose_caption: chooses one of a picture's captions at each visit.
        seed: of the replacements.
        max_skipped: how many different pictures one item may replace before DataError is raised.
        buckets: the size of each picture; None: all are squares.
        depth_of: reads the depth map of a picture, cropped and mirrored as the picture is; None if
            there are none.
    """

    def __init__(
        self,
        *,
        rows: Rows,
        reader: Reader,
        transform: Transform,
        choose_caption: CaptionChooser,
        seed: int,
        max_skipped: int | None,
        buckets: Buckets | None = None,
        depth_of: DepthOf | None = None,
    ) -> None:
        self._rows = rows
        self.reader = reader
        self.transform = transform
        self._moments_of: MomentsOf | None = None
        self._context_of: ContextOf | None = None
        self._choose_caption = choose_caption
        self._max_skipped = max_skipped
        self._replacement = KeyedRandom(seed, "replacement")
        self.buckets = buckets
        self.depth_of = depth_of

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, item: tuple[int, int]) -> Row:
        """Return the row of (index, ordinal), or of its replacement if it cannot be read."""
        index, ordinal = map(int, item)
        size = self.size_of(index)
        skipped: dict[str, str] = {}
        for attempt in count():
            row = self._rows[index]
            try:
                content = self._content(index, row.name, ordinal, size)
                depth = self._depth(index, row.name, ordinal, size)
            except ChangedFileError:  # it may be sound, but is not the one that was listed
                raise
            except DataError as error:
                if self._max_skipped is None:
                    raise
                skipped[row.name] = f"{error.problem.rstrip('.')}."
                candidates, distinct = self._replacements(index)
                if len(skipped) > self._max_skipped or len(skipped) == distinct:
                    raise too_many_broken_error(str(error), self._max_skipped) from error
                uniform = self._replacement.uniform(ordinal, 1, attempt)[0]
                index = int(candidates[int(uniform * len(candidates))])
            else:
                caption = self._choose_caption(row.captions, ordinal)
                return replace(
                    content,
                    caption=caption,
                    label=row.label,
                    depth=depth,
                    context=self._context_of(caption) if self._context_of else None,
                    skipped=tuple(skipped.items()),
                )

    def size_of(self, index: int) -> tuple[int, int] | None:
        """Return the (width, height) of a picture's bucket; None if all pictures are squares."""
        return self.buckets.size_of(index) if self.buckets else None

    def _replacements(self, index: int) -> tuple[Sequence[int], int]:
        """Return the indices of the pictures that may replace one, and how many names they have."""
        if self.buckets is None:
            return range(len(self)), self._rows.distinct_names
        members = np.flatnonzero(self.buckets.bucket_of == self.buckets.bucket_of[index])
        return members, len({self._rows[int(member)].name for member in members})

    def _content(self, index: int, name: str, ordinal: int, size: tuple[int, int] | None) -> Row:
        """Return a row with the picture, or with its cached moments. Raises DataError."""
        if self._moments_of is None:
            return Row(self.transform(self.reader(name, size), ordinal, size), caption="")
        moments, digest = self._moments_of(index, self.transform.is_mirrored(ordinal))
        return Row(None, caption="", moments=moments, pixels_sha256=digest)

    def _depth(
        self, index: int, name: str, ordinal: int, size: tuple[int, int] | None
    ) -> Tensor | None:
        """Return the depth map [1, H, W] of a picture, in [0, 1]; None if there are none."""
        if self.depth_of is None:
            return None
        width, height = self.sizes[index].tolist()
        side = self.transform.image_size
        pixels = self.depth_of(name, (width, height), size or (side, side))
        return (self.transform(pixels, ordinal, size).mean(0, keepdim=True) + 1) / 2

    def with_cache(
        self, moments_of: MomentsOf, context_of: ContextOf | None = None
    ) -> "PictureSplit":
        """Return the same split, whose rows bring what is cached in place of their pictures."""
        cached = copy.copy(self)
        cached._moments_of = moments_of
        cached._context_of = context_of
        return cached

    @property
    def has_fixed_captions(self) -> bool:
        """Whether each visit reads one of `captions` as it is."""
        return not getattr(self._choose_caption, "changes_captions", False)

    @property
    def names(self) -> list[str]:
        """Relative file names, by index."""
        return self._rows.names

    @property
    def captions(self) -> list[str]:
        """All captions, ordered by index; those of one picture follow each other."""
        return self._rows.captions

    @property
    def labels(self) -> list[int]:
        """Labels, by index."""
        return self._rows.labels

    @property
    def sizes(self) -> np.ndarray:
        """(width, height) of the upright pictures in their own pixels, int32 [N, 2], by index."""
        return self._rows.sizes

    @property
    def weights(self) -> np.ndarray | None:
        """How often each picture is visited beside the others, float64 [N]; None: all alike."""
        return self._rows.weights

    @property
    def notes(self) -> list[str]:
        """Lines for the user about weights and buckets."""
        return [*weights_notes(self.weights), *bucket_notes(self.buckets)]

    def spread_captions(self, count: int) -> list[str]:
        """Return `count` captions spread evenly over the split, each the first of its picture.

        Empty captions are used only if there are no others.
        """
        return self._rows.spread_captions(count)


def make_splits(
    *,
    rows: Sequence[PictureRow],
    reader: Reader,
    fraction: float,
    training: Transform,
    seed: int,
    choose_caption: CaptionChooser = first_caption,
    max_skipped: int | None = None,
) -> dict[str, PictureSplit]:
    """Return the splits "train" and "validation" of the rows. Each name is in one of them only.

    fraction: share of the pictures that is held out, see `hold_out_count`. The other arguments are
    those of `split_table`.
    """
    return split_table(
        table=rows_table(rows),
        is_held_out=held_out_rows(rows, fraction, seed),
        reader=reader,
        training=training,
        seed=seed,
        choose_caption=choose_caption,
        max_skipped=max_skipped,
    )


def split_table(
    *,
    table: pa.Table,
    is_held_out: np.ndarray,
    reader: Reader,
    training: Transform,
    seed: int,
    choose_caption: CaptionChooser = first_caption,
    max_skipped: int | None = None,
    choose_buckets: BucketChooser | None = None,
    depth_of: DepthOf | None = None,
) -> dict[str, PictureSplit]:
    """Return the splits "train" and "validation" of the rows of a table.

    Validation uses the centre crop, a square, without a flip, and the first caption of each
    picture.

    Args:
        table: the rows of both splits, see `rows_table`.
        is_held_out: whether each row is in the validation split, bool [N].
        reader: see `PictureSplit`.
        training: the transform of the training pictures.
        seed: of the hold-out and the replacements.
        choose_caption: chooses the captions for training.
        max_skipped: see `PictureSplit`.
        choose_buckets: chooses the sizes of the training pictures; None: all are squares.
        depth_of: see `PictureSplit`.
    """
    centred = Transform(image_size=training.image_size, crop="center", flip=False, seed=seed)
    splits = {}
    for name, is_in_split, transform, chooser in (
        ("train", ~is_held_out, training, choose_caption),
        ("validation", is_held_out, centred, first_caption),
    ):
        rows_of_split = Rows(table, np.flatnonzero(is_in_split))
        buckets = None
        if choose_buckets is not None and name == "train":
            buckets = choose_buckets(rows_of_split.sizes, rows_of_split.weights)
        splits[name] = PictureSplit(
            rows=rows_of_split,
            reader=reader,
            transform=transform,
            choose_caption=chooser,
            seed=seed,
            max_skipped=max_skipped,
            buckets=buckets,
            depth_of=depth_of,
        )
    return splits
