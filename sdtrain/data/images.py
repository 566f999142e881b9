"""A folder of captioned pictures.

The captions are parsed by `captions.py`, so that an error can name file and line, and then live in
a `datasets.Dataset`: Arrow memory, which forked loader workers share without copying it. datasets'
own imagefolder drops pictures without a row silently.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from torch import Tensor

from sdtrain.data.caption_draw import CaptionDraw
from sdtrain.data.captions import LAYOUTS, Captioned, read_captions
from sdtrain.data.crop import Transform, resize_short_side
from sdtrain.data.decode import WHITE, open_picture
from sdtrain.data.headers import Headers, check_counts, classify_headers, refuse_unusable
from sdtrain.data.labels import labels_of
from sdtrain.data.listing import Listing, list_folder, some
from sdtrain.data.split import (
    PictureRow,
    PictureSplit,
    bad_option,
    check_options,
    make_splits,
    rows_hash,
)
from sdtrain.errors import DataError
from sdtrain.types import Classes

CACHE_BYTES = 256 * 2**20


class FolderReader:
    """name -> uint8 [3, h, w], short side image_size.

    Keeps what it read, up to CACHE_BYTES in each process. Full, the cache takes nothing in and
    throws nothing out: epochs visit all pictures in turn, where the oldest entry is the one needed
    next.
    """

    def __init__(self, folder: str, image_size: int, background: Sequence[int]) -> None:
        self.folder = folder
        self.image_size = image_size
        self.background = tuple(background)
        self._cache: dict[str, Tensor] = {}
        self._free = CACHE_BYTES

    def __call__(self, name: str) -> Tensor:
        if name in self._cache:
            return self._cache[name]
        picture = open_picture(os.path.join(self.folder, name), background=self.background)
        pixels = resize_short_side(picture, self.image_size)
        if pixels.nbytes <= self._free:
            self._cache[name] = pixels
            self._free -= pixels.nbytes
        return pixels

    def __reduce__(self):
        return FolderReader, (self.folder, self.image_size, self.background)


class Images:
    """A folder of pictures with captions.

    These are in metadata.jsonl or metadata.csv, or in a .txt beside each picture. Subfolders belong
    to it, and folders that links lead to; what begins with a dot does not. Every picture's header
    is read at construction, its pixels when they are asked for. DataError for what is wrong in the
    folder, UserError for an option.

    Args:
        path: the folder.
        image_size: side of the squares in pixels.
        crop: where a square is cut from a picture for training.
        flip: whether half of the training pictures are mirrored.
        validation_fraction: share of the pictures that is held out, see `hold_out_count`.
        missing_captions: "empty" trains a picture without a caption with the empty one.
        on_error: "fail" raises DataError for a bad picture. "skip" leaves those with a bad header
            out of the listing, with a line in `notes`, and gives another picture of the split for
            one whose pixels turn out broken later.
        max_skipped: how many different pictures may be left out or replaced. A count, because each
            is one that somebody could look at, whatever the size of the folder: a share of a large
            one would hide a disk that fails.
        captions, shuffle_tags, drop_tags, keep_tags: of training, see `CaptionDraw`; validation
            reads the first caption as it stands.
        upscale: whether pictures smaller than the crop are scaled up; else they are bad ones.
        background: (red, green, blue) in 0..255 behind transparent pixels.
        seed: of crops, flips, captions, replacements and of what is held out.
    """

    def __init__(
        self,
        *,
        path: str,
        image_size: int = 32,
        crop: Literal["random", "center"] = "random",
        flip: bool = True,
        validation_fraction: float = 0.05,
        missing_captions: Literal["error", "empty"] = "error",
        on_error: Literal["fail", "skip"] = "fail",
        max_skipped: int = 100,
        captions: Literal["one", "all"] = "all",
        shuffle_tags: bool = False,
        drop_tags: float = 0.0,
        keep_tags: int = 0,
        upscale: bool = False,
        background: Sequence[int] = WHITE,
        seed: int = 0,
    ) -> None:
        check_options(
            image_size=image_size, validation_fraction=validation_fraction, background=background
        )
        _check_words(missing_captions, on_error, max_skipped)
        caption_of = CaptionDraw(
            captions=captions,
            shuffle_tags=shuffle_tags,
            drop_tags=drop_tags,
            keep_tags=keep_tags,
            seed=seed,
        )
        training = Transform(image_size=image_size, crop=crop, flip=flip, seed=seed)
        self.image_size = image_size
        folder, listing = list_pictures(path)
        captioned = read_captions(folder, listing, missing_captions)
        headers = classify_headers(folder, {row.name for row in captioned.rows}, image_size)
        if upscale:
            headers.take_in_small()
        if on_error == "fail":
            refuse_unusable(folder, headers, image_size)
        check_counts(path, folder, headers, max_skipped)
        self.notes = _notes(folder, listing, captioned, headers)
        self.max_skipped = max_skipped - len(headers.unusable) if on_error == "skip" else None
        rows, classes = _rows(captioned, headers, caption_of)
        hashed = [(row.name, "\n".join(row.captions), headers.marks[row.name]) for row in rows]
        self.sha256 = rows_hash(hashed)
        self.num_classes = classes.count
        self._splits = make_splits(
            rows=rows,
            read=FolderReader(folder, image_size, background),
            fraction=validation_fraction,
            training=training,
            caption_of=caption_of,
            seed=seed,
            max_skipped=self.max_skipped,
        )
        self.classes = replace(
            classes,
            sha256=_labelled_hash(hashed, rows),
            untrained=_untrained(classes, self._splits["train"]),
        )

    def split(self, name: str) -> PictureSplit:
        """The pictures of "train" or "validation"."""
        return self._splits[name]

    def example_prompts(self, count: int) -> list[str]:
        """`count` training captions, spread evenly over the sorted files."""
        return self._splits["train"].spread(count)


def _check_words(missing_captions: str, on_error: str, max_skipped: int) -> None:
    if missing_captions not in ("error", "empty"):
        raise bad_option("missing_captions", missing_captions, "is none of error, empty")
    if on_error not in ("fail", "skip"):
        raise bad_option("on_error", on_error, "is none of fail, skip")
    if max_skipped < 0:
        raise bad_option("max_skipped", max_skipped, "must be at least 0")


def _rows(
    captioned: Captioned, headers: Headers, caption_of: CaptionDraw
) -> tuple[list[PictureRow], Classes]:
    """The pictures that can be used."""
    described = [row for row in captioned.rows if row.name in headers.marks]
    labels, classes = labels_of(described)
    rows = []
    for row, label in zip(described, labels, strict=True):
        rows.append(PictureRow(row.name, caption_of.read(row.captions), label))
    return rows, classes


def _labelled_hash(hashed: Sequence[tuple[str, str, str]], rows: Sequence[PictureRow]) -> str:
    return rows_hash([*hashed, ("labels", "", str([row.label for row in rows]))])


def _untrained(classes: Classes, train: PictureSplit) -> tuple[int, ...]:
    trained = set(train.labels)
    return tuple(label for label in range(classes.count) if label not in trained)


def list_pictures(path: str) -> tuple[str, Listing]:
    """The folder, and what lies in it. DataError where that is no picture."""
    # "" would become the working directory.
    folder = os.path.abspath(os.path.expanduser(path)) if path else ""
    if not os.path.isdir(folder):
        wrong = "is a file" if os.path.exists(folder) else "does not exist"
        raise DataError(
            f"{wrong}; it must be a folder of pictures with captions ({LAYOUTS})",
            key="data.path",
            value=folder,
            remedy="Change data.path.",
        )
    listing = list_folder(folder)
    if not listing.names:
        held = listing.left_out(())
        raise DataError(
            f"holds no pictures{f', but {held}' if held else ''}; they must end in .png, .jpg, "
            ".webp or another suffix of a picture that Pillow opens",
            key="data.path",
            value=folder,
            remedy="Change data.path.",
        )
    return folder, listing


def _notes(folder: str, listing: Listing, captioned: Captioned, headers: Headers) -> list[str]:
    """Lines about all that is left out, or is not read as it stands there."""
    notes = []
    unusable = headers.unusable
    if unusable:
        first = next(iter(unusable.values()))
        notes.append(
            f"data.on_error=skip: {len(unusable)} of {headers.count} pictures are left out: "
            f"{some(list(unusable))}. The first: {first.reason}"
        )
    read = headers.marks.keys() | unusable.keys() | captioned.sources
    left_out = listing.left_out(read)
    if left_out:
        notes.append(f"data.path={folder}: left out are {left_out}.")
    if headers.scaled_up:
        notes.append(
            f"data.upscale: {len(headers.scaled_up)} of {headers.count} pictures are smaller than "
            f"the crop and are scaled up: {some(headers.scaled_up)}."
        )
    if headers.frames:
        notes.append(
            f"Of {len(headers.frames)} pictures with several frames the first is read: "
            f"{some(headers.frames)}."
        )
    return notes + captioned.notes
