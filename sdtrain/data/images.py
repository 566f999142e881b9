"""A folder of captioned pictures.

The captions are parsed by `captions.py`, so that an error can name file and line. The imagefolder
loader of datasets is not used, because it silently drops pictures without a row.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from sdtrain.data.caption_draw import CaptionDraw
from sdtrain.data.captions import LAYOUTS, FolderCaptions, read_captions
from sdtrain.data.crop import Transform
from sdtrain.data.decode import WHITE
from sdtrain.data.headers import Headers, check_counts, check_usable, classify_headers
from sdtrain.data.labels import labels_of
from sdtrain.data.listing import Listing, list_folder, shortened
from sdtrain.data.reader import Folder, PictureReader
from sdtrain.data.split import (
    PictureRow,
    PictureSplit,
    check_options,
    make_splits,
    option_error,
    rows_hash,
)
from sdtrain.data.weights import weights_notes, weights_of
from sdtrain.errors import DataError
from sdtrain.types import Classes


class Images:
    """A folder of pictures with captions.

    The captions are in metadata.jsonl or metadata.csv, or in a .txt file beside each picture. A
    column weight of the metadata says how often a picture is visited, see `order.Visits`.
    Subfolders and linked folders are included, names that begin with a dot are not. Construction
    reads the header of every picture; pixels are read on access. Raises DataError for a problem in
    the folder, UserError for an argument that is not allowed.

    Args:
        path: the folder.
        image_size: side of the squares in pixels.
        crop: how a square is cut from a training picture.
        flip: whether half of the training pictures are mirrored.
        validation_fraction: share of the pictures that is held out, see `hold_out_count`.
        missing_captions: "error" raises DataError for a picture without a caption, "empty" trains
            it with an empty one.
        on_error: "fail" raises DataError for a bad picture. "skip" leaves out pictures with a bad
            header, with a line in `notes`, and replaces a picture whose pixels turn out to be
            broken later by another one of its split.
        max_skipped: how many different pictures may be left out or replaced. A count and not a
            share: somebody can inspect each of them, while a share of a large folder would hide a
            failing disk.
        captions, shuffle_tags, drop_tags, keep_tags: for training, see `CaptionDraw`; validation
            reads the first caption unchanged.
        upscale: whether pictures smaller than the crop are scaled up; otherwise they count as bad.
        background: (red, green, blue) in 0..255 behind transparent pixels.
        seed: of crops, flips, captions, replacements and the hold-out.
    """

    def __init__(
        self,
        *,
        path: str,
        image_size: int = 32,
        crop: Literal["random", "center"] = "center",
        flip: bool = False,
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
        _check_choices(missing_captions, on_error, max_skipped)
        caption_draw = CaptionDraw(
            captions=captions,
            shuffle_tags=shuffle_tags,
            drop_tags=drop_tags,
            keep_tags=keep_tags,
            seed=seed,
        )
        training = Transform(image_size=image_size, crop=crop, flip=flip, seed=seed)
        self.image_size = image_size
        folder, listing = list_pictures(path)
        folder_captions = read_captions(folder, listing, missing_captions)
        headers = _read_headers(folder, folder_captions, image_size, upscale)
        if on_error == "fail":
            check_usable(folder, headers, image_size)
        check_counts(path, folder, headers, max_skipped)
        self.notes = _notes(folder, listing, folder_captions, headers)
        left_out = len(headers.unusable)
        self.max_skipped = max_skipped - left_out if on_error == "skip" else None
        rows, classes = _usable_rows(folder_captions, headers, caption_draw)
        hashed = _hashed_rows(rows, headers)
        self.sha256 = rows_hash(hashed)
        self.num_classes = classes.count
        self._splits = make_splits(
            rows=rows,
            reader=PictureReader(Folder(folder), image_size, background),
            fraction=validation_fraction,
            training=training,
            choose_caption=caption_draw,
            seed=seed,
            max_skipped=self.max_skipped,
        )
        self.notes += weights_notes(self._splits["train"].weights)
        self.classes = replace(
            classes,
            sha256=_labelled_hash(hashed, rows),
            untrained=_untrained(classes, self._splits["train"]),
        )

    def split(self, name: str) -> PictureSplit:
        """Return the split "train" or "validation"."""
        return self._splits[name]

    def example_prompts(self, count: int) -> list[str]:
        """Return `count` training captions, spread evenly over the sorted files."""
        return self._splits["train"].spread_captions(count)


def _check_choices(missing_captions: str, on_error: str, max_skipped: int) -> None:
    if missing_captions not in ("error", "empty"):
        raise option_error("missing_captions", missing_captions, "is none of error, empty")
    if on_error not in ("fail", "skip"):
        raise option_error("on_error", on_error, "is none of fail, skip")
    if max_skipped < 0:
        raise option_error("max_skipped", max_skipped, "must be at least 0")


def _read_headers(
    folder: str, folder_captions: FolderCaptions, image_size: int, upscale: bool
) -> Headers:
    names = {picture.name for picture in folder_captions.pictures}
    headers = classify_headers(Folder(folder), names, image_size)
    if upscale:
        headers.accept_small()
    return headers


def _usable_rows(
    folder_captions: FolderCaptions, headers: Headers, caption_draw: CaptionDraw
) -> tuple[list[PictureRow], Classes]:
    """Return a labelled row for each usable picture, and the classes."""
    usable = [
        picture for picture in folder_captions.pictures if picture.name in headers.fingerprints
    ]
    labels, classes = labels_of(usable)
    weights = weights_of(usable) or [None] * len(usable)
    rows = []
    for picture, label, weight in zip(usable, labels, weights, strict=True):
        captions = caption_draw.candidates(picture.captions)
        size = headers.sizes[picture.name]
        rows.append(PictureRow(picture.name, captions, size, label, weight))
    return rows, classes


def _hashed_rows(rows: Sequence[PictureRow], headers: Headers) -> list[tuple[str, str, str]]:
    """Return (name, captions, fingerprint of the file and weight) of each row, for `rows_hash`."""
    hashed = []
    for row in rows:
        fingerprint = headers.fingerprints[row.name]
        if row.weight is not None:
            fingerprint += f" weight {row.weight!r}"
        hashed.append((row.name, "\n".join(row.captions), fingerprint))
    return hashed


def _labelled_hash(hashed: Sequence[tuple[str, str, str]], rows: Sequence[PictureRow]) -> str:
    return rows_hash([*hashed, ("labels", "", str([row.label for row in rows]))])


def _untrained(classes: Classes, train: PictureSplit) -> tuple[int, ...]:
    """Return the labels that no training picture has."""
    trained = set(train.labels)
    return tuple(label for label in range(classes.count) if label not in trained)


def list_pictures(path: str) -> tuple[str, Listing]:
    """Return the absolute path of the folder and its listing.

    Raises DataError if it is not a folder or holds no pictures.
    """
    # abspath("") would be the working directory.
    folder = os.path.abspath(os.path.expanduser(path)) if path else ""
    if not os.path.isdir(folder):
        problem = "is a file" if os.path.exists(folder) else "does not exist"
        raise DataError(
            f"{problem}; it must be a folder of pictures with captions ({LAYOUTS})",
            key="data.path",
            value=folder,
            remedy="Change data.path.",
        )
    listing = list_folder(folder)
    if not listing.names:
        other = listing.summarise_ignored(())
        raise DataError(
            f"holds no pictures{f', but {other}' if other else ''}; they must end in .png, .jpg, "
            ".webp or another suffix of a picture that Pillow opens",
            key="data.path",
            value=folder,
            remedy="Change data.path.",
        )
    return folder, listing


def _notes(
    folder: str, listing: Listing, folder_captions: FolderCaptions, headers: Headers
) -> list[str]:
    """Return lines about everything that is left out or not read as it is stored."""
    notes = []
    unusable = headers.unusable
    if unusable:
        first = next(iter(unusable.values()))
        notes.append(
            f"data.on_error=skip: {len(unusable)} of {headers.count} pictures are left out: "
            f"{shortened(list(unusable))}. The first: {first.reason}{headers.small_note}"
        )
    read = headers.fingerprints.keys() | unusable.keys() | folder_captions.caption_files
    ignored = listing.summarise_ignored(read)
    if ignored:
        notes.append(f"data.path={folder}: not read: {ignored}.")
    if headers.scaled_up:
        notes.append(
            f"data.upscale: {len(headers.scaled_up)} of {headers.count} pictures are smaller than "
            f"the crop and are scaled up, for validation too: {shortened(headers.scaled_up)}."
        )
    if headers.frames:
        notes.append(
            f"{len(headers.frames)} pictures have several frames, of which only the first is "
            f"read: {shortened(headers.frames)}."
        )
    return notes + folder_captions.notes
