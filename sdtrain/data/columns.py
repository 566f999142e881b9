"""Read captions, labels and weights from the columns of a stored data set."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sdtrain.data.caption_template import CaptionTemplate
from sdtrain.data.captions import CaptionedPicture, FolderCaptions, parse_captions
from sdtrain.data.listing import shortened
from sdtrain.data.stored import Store
from sdtrain.data.weights import WeightColumn
from sdtrain.errors import DataError

NO_CAPTION = ("",)


@dataclass(frozen=True, kw_only=True)
class Columns:
    """data.columns: names of the columns of a data set. None stands for the usual names.

    image: pictures; of tar files the suffix of their names. caption: a text or a list of several.
    label: a number or a name. weight: how often a picture is visited, see `order.Visits`. depth:
    depth maps, stored as the pictures are; None reads none.
    """

    image: str | None = None
    caption: str | None = None
    label: str | None = None
    weight: str | None = None
    depth: str | None = None


def read_columns(
    store: Store,
    columns: Columns,
    template: CaptionTemplate | None,
    missing_captions: Literal["error", "empty"],
    place: str,
) -> FolderCaptions:
    """Return the pictures of a store with their captions, labels and weights, sorted by name.

    Args:
        store: the data set.
        columns: which columns are read.
        template: makes the captions of several columns; None if they are in one.
        missing_captions: "error" raises DataError if a picture has no caption, "empty" gives it "".
        place: of the data set, for messages.

    Raises DataError for a column that does not exist, or does not hold what it must.
    """
    if template is None:
        captions = _captions(store, columns, missing_captions, place)
    else:
        captions = _captions_of_template(store, template, place)
    labels = _values(store, _find(store, "label", columns.label, place))
    weights = _values(store, _find(store, "weight", columns.weight, place))
    pictures = []
    for row in zip(store.names, captions, labels, weights, store.folders(), strict=True):
        pictures.append(CaptionedPicture(*row))
    pictures.sort(key=lambda picture: picture.name)
    empty = [picture.name for picture in pictures if picture.captions == NO_CAPTION]
    notes = list(store.notes)
    if empty and missing_captions == "error":
        raise DataError(
            f"{len(empty)} of {len(pictures)} pictures in {place} have no caption: "
            f"{shortened(empty)}. {_columns_of(store)}",
            key="data.missing_captions",
            remedy="Set data.columns.caption to another column, or data.missing_captions=empty to "
            "train them with the empty caption.",
        )
    if empty:
        notes.append(
            f"{len(empty)} of {len(pictures)} pictures have no caption and are given the empty "
            f"one: {shortened(empty)}."
        )
    return FolderCaptions(pictures, set(), notes)


def weight_column(store: Store, columns: Columns, place: str) -> WeightColumn:
    """Return where the weights of a store are. The arguments are those of `read_columns`."""
    column = _find(store, "weight", columns.weight, place)
    return WeightColumn(
        key="data.columns.weight",
        remedy=f"rename the column {column} if it means something else, or set "
        "data.columns.weight to another one",
        location=lambda name: f"column {column} of {store.location(name)}",
    )


def _captions(
    store: Store, columns: Columns, missing_captions: str, place: str
) -> list[tuple[str, ...]]:
    """Return the captions of each picture."""
    column = _find(store, "caption", columns.caption, place)
    if column is None and missing_captions == "error":
        usual = ", ".join(store.default_columns["caption"])
        raise DataError(
            f"{place} has none of the columns {usual}. {_columns_of(store)}",
            key="data.columns.caption",
            remedy="Set data.columns.caption to the column of the captions, or "
            "data.missing_captions=empty to train without.",
        )
    captions = []
    for name, value in zip(store.names, _values(store, column), strict=True):
        captions.append(parse_captions(value, f"{place}, column {column}, {name}"))
    return captions


def _captions_of_template(
    store: Store, template: CaptionTemplate, place: str
) -> list[tuple[str, ...]]:
    """Return a single caption of each picture, "" if one of the template's columns is empty."""
    template.check(store.columns, place)
    if not template.columns:
        return [parse_captions(template({}), place)] * len(store.names)
    values = [store.values(column) for column in template.columns]
    captions = []
    for row in zip(*values, strict=True):
        caption = template(dict(zip(template.columns, row, strict=True)))
        captions.append(parse_captions(caption, place))
    return captions


def _find(store: Store, role: str, typed: str | None, place: str) -> str | None:
    """Return the column that has a role, or None if there is none of the usual names.

    typed: the column that the user named. Raises DataError if it does not exist.
    """
    if typed is not None:
        if typed not in store.columns:
            key = f"data.columns.{role}"
            raise DataError(
                f"is no column of {place}. {_columns_of(store)}",
                key=key,
                value=typed,
                remedy=f"Change {key}.",
            )
        return typed
    for column in store.default_columns[role]:
        if column in store.columns:
            return column
    return None


def _values(store: Store, column: str | None) -> Sequence[Any]:
    return [None] * len(store.names) if column is None else store.values(column)


def _columns_of(store: Store) -> str:
    others = ", ".join(store.columns)
    return (
        f"Beside the pictures it has the columns {others}." if others else "It has pictures only."
    )
