"""What a data set of real pictures makes of its captions and headers: the rows of the pictures that
can be used, their hash, and lines about all others.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sdtrain.data.caption_draw import CaptionDraw
from sdtrain.data.captions import FolderCaptions
from sdtrain.data.headers import Headers
from sdtrain.data.labels import labels_of
from sdtrain.data.listing import shortened
from sdtrain.data.rows import PictureRow
from sdtrain.data.split import PictureSplit, rows_hash
from sdtrain.data.weights import WeightColumn, weights_of
from sdtrain.types import Classes


@dataclass(frozen=True)
class UsablePictures:
    """The pictures that can be used.

    sha256: hash of the rows. classes: what their labels mean.
    """

    rows: list[PictureRow]
    sha256: str
    classes: Classes


def usable_pictures(
    captions: FolderCaptions,
    headers: Headers,
    caption_draw: CaptionDraw,
    weight_column: WeightColumn,
) -> UsablePictures:
    """Return the pictures with a usable header. Raises DataError for weights that are not allowed.

    caption_draw: makes the captions to draw from. weight_column: where the weights are.
    """
    usable = [picture for picture in captions.pictures if picture.name in headers.fingerprints]
    labels, classes = labels_of(usable)
    weights = weights_of(usable, weight_column) or [None] * len(usable)
    rows = []
    for picture, label, weight in zip(usable, labels, weights, strict=True):
        candidates = caption_draw.candidates(picture.captions)
        size = headers.sizes[picture.name]
        rows.append(PictureRow(picture.name, candidates, size, label, weight))
    hashed = _hashed_rows(rows, headers)
    labelled = rows_hash([*hashed, ("labels", "", str([row.label for row in rows]))])
    return UsablePictures(rows, rows_hash(hashed), replace(classes, sha256=labelled))


def _hashed_rows(rows: Sequence[PictureRow], headers: Headers) -> list[tuple[str, str, str]]:
    """Return (name, captions, fingerprint of the file and weight) of each row, for `rows_hash`."""
    hashed = []
    for row in rows:
        fingerprint = headers.fingerprints[row.name]
        if row.weight is not None:
            fingerprint += f" weight {row.weight!r}"
        hashed.append((row.name, "\n".join(row.captions), fingerprint))
    return hashed


def with_untrained(classes: Classes, train: PictureSplit) -> Classes:
    """Return the classes with the labels that no training picture has."""
    trained = set(train.labels)
    untrained = tuple(label for label in range(classes.count) if label not in trained)
    return replace(classes, untrained=untrained)


def header_notes(headers: Headers) -> list[str]:
    """Return lines about pictures that are left out, scaled up, or read in part."""
    notes = []
    unusable = headers.unusable
    if unusable:
        first = next(iter(unusable.values()))
        notes.append(
            f"data.on_error=skip: {len(unusable)} of {headers.count} pictures are left out: "
            f"{shortened(list(unusable))}. The first: {first.reason}{headers.small_note}"
        )
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
    return notes
