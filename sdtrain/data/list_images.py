"""List a folder of captioned pictures: which there are, how large, captioned with what."""

import os
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sdtrain.console import warn
from sdtrain.data.captioned import PictureOptions
from sdtrain.data.captions import (
    LAYOUTS,
    METADATA,
    FolderCaptions,
    caption_file,
    read_captions,
)
from sdtrain.data.folder_state import FolderState, has_few_files, now, stamp_of
from sdtrain.data.headers import Headers, check_counts, check_usable, read_headers
from sdtrain.data.inventory import CAPTION_STAMPS, HELD_OUT, PICTURE_STAMPS, Inventory
from sdtrain.data.known_headers import KnownHeaders
from sdtrain.data.listing import CAPTION_SUFFIXES, Listing, list_folder
from sdtrain.data.rows import COLUMNS as ROW_COLUMNS
from sdtrain.data.rows import PictureRow, Rows, rows_table
from sdtrain.data.split import held_out_rows
from sdtrain.data.take_inventory import Taken, take_inventory
from sdtrain.data.usable import header_notes, usable_pictures, with_untrained
from sdtrain.data.weights import WeightColumn, check_some_are_trained
from sdtrain.errors import DataError

LISTED_OPTIONS = (
    "image_size",
    "upscale",
    "buckets",
    "bucket_step",
    "bucket_max_ratio",
    "missing_captions",
    "caption_template",
    "on_error",
    "max_skipped",
    "validation_fraction",
    "seed",
    "captions",
)
"""Options that decide about the rows of a folder, and which of them are held out."""


def inventory_of(folder: str, options: PictureOptions, *, refresh: bool) -> Inventory:
    """Return the inventory of a folder, a stored one if the folder has not changed since.

    Args:
        folder: its absolute path.
        options: what decides about the rows.
        refresh: whether the folder is listed anew in any case.
    """
    return take_inventory(
        folder, listed_options(options), partial(list_images, folder, options), refresh=refresh
    )


def listed_options(options: PictureOptions) -> dict[str, Any]:
    """Return the options that decide about rows, as values fit for json."""
    listed = {name: getattr(options, name) for name in LISTED_OPTIONS}
    return listed | {"has_tags": options.caption_draw().has_tags}


def list_images(folder: str, options: PictureOptions, known: KnownHeaders) -> Taken:
    """List a folder of pictures. Raises DataError for a problem in it.

    Args:
        folder: its absolute path.
        options: what decides about the rows.
        known: reads the headers of the pictures.
    """
    began = now()
    listing = list_pictures(folder)
    state = FolderState.of(folder, listing, METADATA, began)
    has_metadata = any(state.files.values())
    compared_later: list[str] = []
    if not has_few_files(listing):
        count = len(listing.names)
        warn(f"Listing {folder}: {count:,} pictures. Later starts read what is found now.")
        compared_later = [] if has_metadata else listing.names
    caption_stamps = _caption_stamps(folder, compared_later)
    folder_captions = read_captions(folder, listing, options.missing_captions, options.template())
    names = sorted({picture.name for picture in folder_captions.pictures})
    headers = read_headers(
        known.folder, names, options.crop_of(), upscale=options.upscale, read=known
    )
    if options.on_error == "fail":
        check_usable(folder, headers, options.image_size)
    check_counts(folder, headers, options.max_skipped)
    weights_in = _weight_column(folder, folder_captions)
    usable = usable_pictures(folder_captions, headers, options.caption_draw(), weights_in)
    is_held_out = held_out_rows(usable.rows, options.validation_fraction, options.seed)
    table = _table(usable.rows, is_held_out, known, caption_stamps)
    train = Rows(table, np.flatnonzero(~is_held_out))
    check_some_are_trained(train.weights, weights_in)
    inventory = Inventory(
        table=table,
        notes=tuple(_listing_notes(folder, listing, folder_captions, headers)),
        sha256=usable.sha256,
        classes=with_untrained(usable.classes, train),
        left_out=len(headers.unusable),
    )
    return Taken(inventory, state)


def _weight_column(folder: str, folder_captions: FolderCaptions) -> WeightColumn:
    """Return where the weights are: in the file of metadata, which is the only caption file."""
    metadata = ", ".join(folder_captions.caption_files.intersection(METADATA))
    return WeightColumn(
        key="data.path",
        remedy="rename the column weight if it means something else, or change data.path",
        location=lambda name: f"the row of {name} in {os.path.join(folder, metadata)}",
    )


def _table(
    rows: Sequence[PictureRow],
    is_held_out: np.ndarray,
    known: KnownHeaders,
    caption_stamps: pa.Table,
) -> pa.Table:
    """Return the table of an inventory. caption_stamps: see `_caption_stamps`."""
    table = rows_table(rows).append_column(HELD_OUT, pa.array(is_held_out))
    table = _append_matching(table, known.to_stored().table, PICTURE_STAMPS)
    return _append_matching(table, caption_stamps, CAPTION_STAMPS).combine_chunks()


def _append_matching(table: pa.Table, other: pa.Table, columns: Iterable[str]) -> pa.Table:
    """Append columns of the rows of `other` that have the same names, null where there is none."""
    places = pc.index_in(table.column("name"), value_set=other.column("name").combine_chunks())
    for column in columns:
        table = table.append_column(column, other.column(column).take(places))
    return table


def _caption_stamps(folder: str, names: Iterable[str]) -> pa.Table:
    """Return the stamps of the caption files beside those pictures that have one."""
    values: dict[str, list] = {name: [] for name in ("name", *CAPTION_STAMPS)}
    for name in names:
        file = caption_file(folder, name)
        stamp = None if file is None else stamp_of(os.path.join(folder, file))
        if stamp is None:
            continue
        suffix = CAPTION_SUFFIXES.index(os.path.splitext(file)[1])
        for column, value in zip(values.values(), (name, suffix, *stamp), strict=True):
            column.append(value)
    types = {"name": ROW_COLUMNS["name"], **CAPTION_STAMPS}
    return pa.table({name: pa.array(each, types[name]) for name, each in values.items()})


def folder_of(path: str) -> str:
    """Return the absolute path of a folder of pictures. Raises DataError if it is no folder."""
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
    return folder


def list_pictures(folder: str) -> Listing:
    """Return the listing of a folder. Raises DataError if it holds no pictures."""
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
    return listing


def _listing_notes(
    folder: str, listing: Listing, folder_captions: FolderCaptions, headers: Headers
) -> list[str]:
    """Return lines about everything that is left out or not read as it is stored."""
    read = headers.fingerprints.keys() | headers.unusable.keys() | folder_captions.caption_files
    ignored = listing.summarise_ignored(read)
    notes = [f"data.path={folder}: not read: {ignored}."] if ignored else []
    return [*header_notes(headers), *notes, *folder_captions.notes]
