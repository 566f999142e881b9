"""Real pictures in two splits: which are held out, and the rows of a split with their pictures."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, count
from typing import Any, NamedTuple

from torch import Tensor

from sdtrain.data.crop import Transform
from sdtrain.errors import DataError, UserError
from sdtrain.randomness import KeyedRandom
from sdtrain.types import Row


def check_options(
    *, image_size: int, validation_fraction: float, background: Sequence[int]
) -> None:
    """Raises UserError for a value that no data set of real pictures can have."""
    if image_size < 1:
        raise bad_option("image_size", image_size, "is no size in pixels: it must be at least 1")
    if not 0 < validation_fraction <= 0.25:
        raise bad_option(
            "validation_fraction",
            validation_fraction,
            "must be above 0 and at most 0.25, which is the most that is held out",
        )
    if len(background) != 3 or not all(0 <= value <= 255 for value in background):
        raise bad_option(
            "background", list(background), "must be red, green, blue, each from 0 to 255"
        )


def bad_option(name: str, value: Any, problem: str) -> UserError:
    """The error of an argument of a data set; problem: the sentence that data.NAME=VALUE begins."""
    key = f"data.{name}"
    return UserError(problem, key=key, value=value, remedy=f"Change {key}.")


def hold_out_count(pictures: int, fraction: float) -> int:
    """How many of `pictures` (at least 2) are held out.

    `fraction` of them, at least 64, at most a quarter, never none.
    """
    return max(1, min(max(round(pictures * fraction), 64), pictures // 4))


def held_out_notes(pictures: int, fraction: float) -> list[str]:
    """A line where another share is held out than the user set, and why."""
    asked = round(pictures * fraction)
    count = hold_out_count(pictures, fraction)
    if count == asked:
        return []
    return [
        f"{count} of {pictures} pictures ({count / pictures:.0%}) are held out for validation, "
        f"where data.validation_fraction={fraction:g} is {asked}: at least 64 are, and at most a "
        "quarter of all."
    ]


def hold_out(names: Sequence[str], fraction: float, seed: int) -> set[str]:
    """The names held out for validation.

    They are the lowest by a hash keyed by `seed`, so that a new picture moves few others.
    """

    def rank(name: str) -> bytes:
        return hashlib.blake2b(f"{seed}/hold_out/{name}".encode(), digest_size=16).digest()

    distinct = sorted(set(names), key=rank)
    return set(distinct[: hold_out_count(len(distinct), fraction)])


def rows_hash(rows: Iterable[tuple[str, str, str | int]]) -> str:
    """sha256 over the rows in their order.

    A row is (name, caption, what tells the picture from another of its name).
    """
    return hashlib.sha256(json.dumps(list(rows)).encode()).hexdigest()


def too_many_broken(last_reason: str, max_skipped: int) -> DataError:
    """The error that ends a run which has met more than `max_skipped` broken pictures.

    last_reason: what is wrong with the last of them, a whole sentence.
    """
    return DataError(
        f"More pictures turned out broken while training than may still be left out "
        f"({max_skipped}), or all of a split. The last: {last_reason}",
        key="data.max_skipped",
        remedy="Look at the disk and the pictures, or raise data.max_skipped.",
    )


class PictureRow(NamedTuple):
    """A picture of a split. captions: at least one, of which each visit reads what a law says."""

    name: str
    captions: Sequence[str]
    label: int = 0


CaptionLaw = Callable[[Sequence[str], int], str]
"""(captions of a picture, ordinal) -> the one that this visit reads."""


def first_caption(captions: Sequence[str], ordinal: int) -> str:
    """The same at every visit."""
    return captions[0]


class PictureSplit:
    """One split: names, captions, `read` that gives a name's pixels, and the transform.

    Fulfils `types.Pictures`. Where a picture cannot be read, DataError; unless up to `max_skipped`
    may be replaced: then the row is another of the split, a pure function of (seed, ordinal,
    attempt), so that batches stay full and equal with any number of workers and ranks, and after a
    resume.
    """

    def __init__(
        self,
        *,
        rows: Sequence[PictureRow],
        read: Callable[[str], Tensor],
        transform: Transform,
        caption_of: CaptionLaw,
        seed: int,
        max_skipped: int | None,
    ) -> None:
        from datasets import Dataset  # here, because it takes a second that other data do not need

        columns = {
            "file_name": [row.name for row in rows],
            "text": [list(row.captions) for row in rows],
            "label": [row.label for row in rows],
        }
        self._rows = Dataset.from_dict(columns)
        self._distinct = len(set(columns["file_name"]))
        self._read = read
        self._transform = transform
        self._caption_of = caption_of
        self._max_skipped = max_skipped
        self._replacement = KeyedRandom(seed, "replacement")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, item: tuple[int, int]) -> Row:
        index, ordinal = map(int, item)
        skipped: dict[str, str] = {}
        for attempt in count():
            row = self._rows[index]
            try:
                image = self._transform(self._read(row["file_name"]), ordinal)
            except DataError as error:
                if self._max_skipped is None:
                    raise
                skipped[row["file_name"]] = str(error)
                if len(skipped) > self._max_skipped or len(skipped) == self._distinct:
                    raise too_many_broken(str(error), self._max_skipped) from error
                index = int(self._replacement.uniform(ordinal, 1, attempt)[0] * len(self))
            else:
                return Row(
                    image=image,
                    caption=self._caption_of(row["text"], ordinal),
                    label=row["label"],
                    skipped=tuple(skipped.items()),
                )

    @property
    def names(self) -> list[str]:
        """Relative file names, in the order of the indices."""
        return self._rows["file_name"][:]

    @property
    def captions(self) -> list[str]:
        """All captions, in the order of the indices; those of one picture follow each other."""
        return list(chain.from_iterable(self._rows["text"]))

    @property
    def labels(self) -> list[int]:
        """In the order of the indices."""
        return self._rows["label"][:]

    def spread(self, count: int) -> list[str]:
        """`count` captions spread evenly over the split, the first of each picture.

        The empty ones are passed over where there are others.
        """
        first = [captions[0] for captions in self._rows["text"]]
        captions = [caption for caption in first if caption] or first
        return [captions[i * len(captions) // count] for i in range(count)]


def make_splits(
    *,
    rows: Sequence[PictureRow],
    read: Callable[[str], Tensor],
    fraction: float,
    training: Transform,
    seed: int,
    caption_of: CaptionLaw = first_caption,
    max_skipped: int | None = None,
) -> dict[str, PictureSplit]:
    """The splits "train", with `training` as its transform and `caption_of` for its captions, and
    "validation": centre crop, no flip, the first caption.

    A name is in one of them only.
    """
    held_out = hold_out([row.name for row in rows], fraction, seed)
    centred = Transform(image_size=training.image_size, crop="center", flip=False, seed=seed)
    train = [row for row in rows if row.name not in held_out]
    validation = [row for row in rows if row.name in held_out]
    splits = {}
    for split, kept, transform, law in (
        ("train", train, training, caption_of),
        ("validation", validation, centred, first_caption),
    ):
        splits[split] = PictureSplit(
            rows=kept,
            read=read,
            transform=transform,
            caption_of=law,
            seed=seed,
            max_skipped=max_skipped,
        )
    return splits
