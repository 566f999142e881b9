"""Pictures in Parquet files, read in place by row group.

A Parquet file stores its rows in groups. A group is the smallest part that can be read, so a few
groups that were read last are kept.
"""

import contextlib
import io
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sdtrain.data.folder_state import Stamp
from sdtrain.data.image_column import (
    DEFAULT_COLUMNS,
    check_column_names,
    check_image_type,
    class_names,
    encoded_picture,
    has_paths,
    named_classes,
    values_of,
)
from sdtrain.data.stored import (
    FileStamps,
    NameIndex,
    are_names,
    check_names,
    file_names,
    folders_of,
    place_of_row,
    unreadable_error,
)
from sdtrain.errors import DataError

GROUP_CACHE_BYTES = 256 * 2**20
"""Row groups that one process keeps; at least one, however large."""

LARGE_GROUP = 64 * 2**20
"""Bytes of a row group beyond which the user is told that reading it for one picture is slow."""


class ParquetFiles:
    """The pictures in Parquet files. Implements `stored.Store`.

    A picture is called by its `path` if all have one of their own, else by FILE:ROW.

    Args:
        paths: of the files, which have the same columns.
        image: column of the pictures: their encoded bytes, or a struct of `bytes` and `path`.

    Raises DataError for a file that is no Parquet file, lacks a column or is damaged.
    """

    default_columns = DEFAULT_COLUMNS

    def __init__(self, paths: Sequence[str], image: str) -> None:
        self._stamps = FileStamps(paths)
        self.paths = self._stamps.paths
        self.files = self._stamps.listed
        # With the column, because each has other pictures under the same names.
        self.identity = f"{self._stamps.identity} {image}"
        self.image = image
        self._metadata = [_read_metadata(path) for path in self.paths]
        schema = self._metadata[0].schema.to_arrow_schema()
        for path, metadata in zip(self.paths, self._metadata, strict=True):
            check_column_names(metadata.schema.to_arrow_schema(), path)
        check_image_type(schema, image, self.paths[0])
        self.columns = [name for name in schema.names if name != image]
        self._class_names = class_names(schema)
        for path, metadata in zip(self.paths, self._metadata, strict=True):
            _check_same_schema(self.paths[0], schema, path, metadata.schema.to_arrow_schema())
        self._starts = _group_starts(self._metadata)
        """First row of each row group, over all files, and behind the last the number of rows."""
        groups = []
        for file, metadata in enumerate(self._metadata):
            groups += [(file, group) for group in range(metadata.num_row_groups)]
        self._groups = groups
        paths = self._picture_paths(schema)
        self._has_names = are_names(paths)
        self.names = paths if self._has_names else self._places_of_rows()
        check_names(self.names)
        self.notes = _notes(self._metadata)
        self._places = NameIndex(self.names)
        counts = [metadata.num_rows for metadata in self._metadata]
        self._file_of = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        self._kept: OrderedDict[int, pa.ChunkedArray] = OrderedDict()

    def _picture_paths(self, schema: pa.Schema) -> list[str | None]:
        if not has_paths(schema.field(self.image).type):
            return [None]
        structs = self._read_column(f"{self.image}.path", self.image)
        return [None if each is None else each["path"] for each in structs]

    def _places_of_rows(self) -> list[str]:
        places = []
        names = file_names(self.paths)
        for name, metadata in zip(names, self._metadata, strict=True):
            places += [place_of_row(name, row) for row in range(metadata.num_rows)]
        return places

    def values(self, column: str) -> list[Any]:
        return named_classes(self._read_column(column, column), self._class_names.get(column))

    def rows(self) -> Sequence[Hashable]:
        return range(len(self.names))

    def folders(self) -> list[str]:
        return folders_of(self.names) if self._has_names else [""] * len(self.names)

    def forget_values(self) -> None:
        """Do nothing: values are read when they are asked for."""

    def _read_column(self, selected: str, column: str) -> list[Any]:
        """Return the values of a column in all files. selected: the part of it that is read."""
        values = []
        for file, path in enumerate(self.paths):
            with self._reading(file):
                table = self._file(file).read([selected], use_threads=False)
            values += values_of(table.column(column), path)
        return values

    def open(self, name: str) -> BinaryIO:
        row = self._places.place(name)
        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        value = self._read_group(group)[row - int(self._starts[group])]
        return io.BytesIO(encoded_picture(value, self.location(name)))

    def stamps(self, names: Iterable[str]) -> dict[str, Stamp]:
        names = list(names)
        return self._stamps.of(names, self._file_of[self._places.places(names)])

    def check_unchanged(self, names: Iterable[str]) -> None:
        self._stamps.check_all()

    def location(self, name: str) -> str:
        row = self._places.place(name)
        file, _ = self._groups[int(np.searchsorted(self._starts, row, side="right")) - 1]
        return f"{self.paths[file]}: {name}"

    def _read_group(self, group: int) -> pa.ChunkedArray:
        """Return the pictures of a row group. Raises ChangedFileError if its file is not as it was
        listed, even if they are kept; DataError if it is damaged.
        """
        file, number = self._groups[group]
        if group in self._kept:
            self._stamps.check(file)
            self._kept.move_to_end(group)
            return self._kept[group]
        with self._reading(file):
            # Without threads: those of the parent do not survive the fork of a loader worker.
            table = self._file(file).read_row_group(number, [self.image], use_threads=False)
        pictures = table.column(self.image)
        self._kept[group] = pictures
        while len(self._kept) > 1 and _total_bytes(self._kept) > GROUP_CACHE_BYTES:
            self._kept.popitem(last=False)
        return pictures

    @contextlib.contextmanager
    def _reading(self, file: int) -> Iterator[None]:
        """Raise ChangedFileError if the file is not as it was listed when the block is entered or
        left, DataError if reading it fails there.
        """
        self._stamps.check(file)
        try:
            yield
        except (OSError, pa.ArrowException) as error:
            self._stamps.check(file)
            raise _damaged(self.paths[file], error) from error
        self._stamps.check(file)

    def _file(self, file: int) -> pq.ParquetFile:
        return pq.ParquetFile(
            self.paths[file], metadata=self._metadata[file], memory_map=True, pre_buffer=False
        )

    def __getstate__(self) -> dict[str, Any]:
        # A worker that is started afresh keeps its own row groups.
        return self.__dict__ | {"_kept": OrderedDict()}


def _total_bytes(kept: OrderedDict[int, pa.ChunkedArray]) -> int:
    return sum(each.nbytes for each in kept.values())


def _read_metadata(path: str) -> pq.FileMetaData:
    try:
        return pq.read_metadata(path, memory_map=True)
    except (OSError, pa.ArrowException) as error:
        raise _damaged(path, error) from error


def _damaged(path: str, error: Exception) -> DataError:
    reason = " ".join(str(error).split())[:200]
    return unreadable_error(path, f"cannot be read as a Parquet file: {reason}")


def _check_same_schema(first: str, expected: pa.Schema, path: str, found: pa.Schema) -> None:
    """Raise DataError unless a file has the columns of the first one, with their types."""
    types = {field.name: field.type for field in found}
    first_types = {field.name: field.type for field in expected}
    for name in first_types | types:
        if types.get(name) != first_types.get(name):
            has = types.get(name, "no such column")
            raise unreadable_error(
                path,
                f"has another schema than {first!r}: of the column {name} it has {has}, "
                f"and the other has {first_types.get(name, 'no such column')}",
                "Remove it, or change data.path to files of one data set.",
            )


def _group_starts(metadata: Sequence[pq.FileMetaData]) -> np.ndarray:
    counts = [0]
    for each in metadata:
        counts += [each.row_group(group).num_rows for group in range(each.num_row_groups)]
    return np.cumsum(counts, dtype=np.int64)


def _notes(metadata: Sequence[pq.FileMetaData]) -> list[str]:
    """Return a line if a row group is so large that reading it for one picture is slow."""
    largest = 0
    for each in metadata:
        for group in range(each.num_row_groups):
            largest = max(largest, each.row_group(group).total_byte_size)
    if largest <= LARGE_GROUP:
        return []
    return [
        f"data.path: a row group of the Parquet files has up to {largest / 2**20:.0f} MiB, and all "
        "of it is read for each picture that is visited. Files with fewer rows in a group (100) "
        "are faster."
    ]
