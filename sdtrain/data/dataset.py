"""Captioned pictures in Parquet, Arrow or tar files, or on the Hugging Face hub, read in place."""

import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Literal

import numpy as np
import pyarrow as pa

from sdtrain.data.captioned import CaptionedPictures, PictureOptions
from sdtrain.data.columns import Columns, read_columns, weight_column
from sdtrain.data.decode import WHITE
from sdtrain.data.depth import depth_of_folder, open_depth_column
from sdtrain.data.folder_state import FolderState
from sdtrain.data.headers import check_counts, check_usable, read_headers
from sdtrain.data.inventory import HELD_OUT, Inventory
from sdtrain.data.known_headers import KnownHeaders
from sdtrain.data.list_images import listed_options
from sdtrain.data.rows import Rows, rows_table
from sdtrain.data.split import held_out_rows
from sdtrain.data.stored import Store
from sdtrain.data.stores import open_store
from sdtrain.data.take_inventory import Taken, take_inventory
from sdtrain.data.usable import header_notes, usable_pictures, with_untrained
from sdtrain.data.weights import check_some_are_trained
from sdtrain.errors import UserError


class StoredPictures(CaptionedPictures):
    """A data set of captioned pictures in files that hold many of them.

    The formats are listed in `stores.open_store`. Nothing is copied. The same pictures have the
    same names, and so the same hold-out and order, in each format and as a folder (`Images`):
    members of a tar file are called by their names, rows by the path stored with the picture, or
    else by file and row. Raises DataError for a problem in the files, UserError for an argument
    that is not allowed.

    Args:
        path: Parquet or tar files (one, a folder, a pattern), a folder written by datasets'
            save_to_disk, or an id of the Hugging Face hub.
        revision: branch, tag or commit on the hub, None for `main`; of nothing else.
        split: of the data set, by the names of its files; None takes `train` if there is one.
        columns: which columns hold what.
        depth, depth_model: as of `images.Images`, in place of a column.
        caption_template: makes the captions of several columns, see `CaptionTemplate`.
        image_size, crop, flip, validation_fraction, missing_captions, on_error, max_skipped,
        captions, shuffle_tags, drop_tags, keep_tags, upscale, buckets, bucket_step,
        bucket_max_ratio, background, refresh, seed, batch_size: as of `images.Images`.
    """

    def __init__(
        self,
        *,
        path: str,
        revision: str | None = None,
        split: str | None = None,
        columns: Columns = Columns(),  # noqa: B008 - it is immutable
        depth: str | None = None,
        depth_model: str | None = None,
        caption_template: str | None = None,
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
        buckets: bool = False,
        bucket_step: int | None = None,
        bucket_max_ratio: float = 2.0,
        background: Sequence[int] = WHITE,
        refresh: bool = False,
        seed: int = 0,
        batch_size: int = 1,
    ) -> None:
        options = PictureOptions(
            image_size=image_size,
            crop=crop,
            flip=flip,
            validation_fraction=validation_fraction,
            missing_captions=missing_captions,
            on_error=on_error,
            max_skipped=max_skipped,
            captions=captions,
            shuffle_tags=shuffle_tags,
            drop_tags=drop_tags,
            keep_tags=keep_tags,
            caption_template=caption_template,
            upscale=upscale,
            buckets=buckets,
            bucket_step=bucket_step,
            bucket_max_ratio=bucket_max_ratio,
            background=background,
            seed=seed,
            batch_size=batch_size,
        )
        _check_one_source_of_depth(columns.depth, {"depth": depth, "depth_model": depth_model})
        store = open_store(
            path, split=split, image=columns.image, revision=revision, other=columns.depth
        )
        depth_column = open_depth_column(store, columns, path, split, revision)
        inventory = inventory_of_store(store, columns, options, path, refresh=refresh)
        store.forget_values()
        depth_of = depth_column or depth_of_folder(depth, depth_model, store.identity)
        super().__init__(inventory, store, options, depth_of)


def _check_one_source_of_depth(column: str | None, others: dict[str, str | None]) -> None:
    """Raise UserError for a column of depth maps beside another source. others: {key: value}."""
    for key, value in others.items():
        if value is not None and column is not None:
            raise UserError(
                f"and data.columns.depth={column} both say where depth maps come from",
                key=f"data.{key}",
                value=value,
                remedy="Remove one of them.",
            )


def inventory_of_store(
    store: Store, columns: Columns, options: PictureOptions, path: str, *, refresh: bool
) -> Inventory:
    """Return the inventory of a stored data set: one that an earlier start has stored if none of
    its files has changed since. The arguments are those of `list_stored`.

    refresh: whether it is listed anew in any case.
    """
    state = FolderState.of_files(store.files)
    read = asdict(columns)
    if columns.depth is None:  # so that listings of earlier versions hold
        del read["depth"]
    paths = list(store.files)
    listed = {
        **listed_options(options),
        "columns": read,
        "path": path,
        "paths": paths,
    }

    def list_pictures(known: KnownHeaders) -> Taken:
        return Taken(list_stored(store, columns, options, path), state)

    folder = os.path.commonpath(paths)
    return take_inventory(folder, listed, list_pictures, refresh=refresh)


def list_stored(store: Store, columns: Columns, options: PictureOptions, path: str) -> Inventory:
    """Return the inventory of a stored data set. Raises DataError for a problem in it.

    Args:
        store: the data set.
        columns: which columns are read.
        options: what decides about the rows.
        path: of the data set, for messages.
    """
    place = f"data.path={path}"
    captions = read_columns(store, columns, options.template(), options.missing_captions, place)
    weights_in = weight_column(store, columns, place)
    # In the order in which they are stored: each row group of a Parquet file is read once.
    headers = read_headers(store, store.names, options.crop_of(), upscale=options.upscale)
    if options.on_error == "fail":
        check_usable(path, headers, options.image_size)
    check_counts(path, headers, options.max_skipped)
    usable = usable_pictures(captions, headers, options.caption_draw(), weights_in)
    is_held_out = held_out_rows(usable.rows, options.validation_fraction, options.seed)
    table = rows_table(usable.rows).append_column(HELD_OUT, pa.array(is_held_out))
    train = Rows(table, np.flatnonzero(~is_held_out))
    check_some_are_trained(train.weights, weights_in)
    return Inventory(
        table=table.combine_chunks(),
        notes=(*header_notes(headers), *captions.notes),
        sha256=usable.sha256,
        classes=with_untrained(usable.classes, train),
        left_out=len(headers.unusable),
    )
