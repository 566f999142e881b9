"""The files of a folder, which are compared with the folder's listing."""

import bisect
import os
from collections.abc import Iterable, Sequence
from typing import BinaryIO

import pyarrow as pa

from sdtrain.data.folder_state import Stamp, stamp_of
from sdtrain.data.inventory import CAPTION_STAMPS, PICTURE_STAMPS
from sdtrain.data.listing import CAPTION_SUFFIXES
from sdtrain.data.reader import Folder, changed_error

FEW = 1000
"""Up to so many rows are looked up one by one; for more, the columns are read as a whole."""

STAMPS = (*PICTURE_STAMPS, *CAPTION_STAMPS)
"""Columns that are compared with the files."""


class ListedFolder(Folder):
    """The files of a listed folder.

    Args:
        path: of the folder.
        table: rows sorted by name, with the columns of files, see `Inventory`.
    """

    def __init__(self, path: str, table: pa.Table) -> None:
        super().__init__(path)
        self.table = table

    def open(self, name: str) -> BinaryIO:
        """Open a picture. Raises ChangedFileError if it or the caption file beside it is not as it
        was listed, DataError if it cannot be opened.
        """
        file = super().open(name)
        try:
            self._compare(name, self._row_of(name), file)
        except BaseException:
            file.close()
            raise
        return file

    def stamps(self, names: Iterable[str]) -> dict[str, Stamp]:
        """Return them as listed."""
        names = list(names)
        if len(names) <= FEW:
            rows = [self._row_of(name) for name in names]
            table = self.table.take(rows)
        else:
            table = self.table
        columns = [table.column(column).to_pylist() for column in ("name", "bytes", "changed_at")]
        found = {name: (size, changed_at) for name, size, changed_at in zip(*columns, strict=True)}
        return {name: found[name] for name in names}

    def check_unchanged(self, names: Iterable[str]) -> None:
        """Compare the files of pictures, and the caption files beside them, without opening them.
        Raises ChangedFileError for the first that is not as it was listed.
        """
        names = list(names)
        if len(names) <= FEW:
            for name in names:
                self._compare(name, self._row_of(name))
            return
        wanted = set(names)
        columns = [self.table.column(column).to_pylist() for column in ("name", *STAMPS)]
        for name, *listed in zip(*columns, strict=True):
            if name in wanted:
                self._compare_with(name, listed)

    def _compare(self, name: str, row: int, file: BinaryIO | None = None) -> None:
        """Compare a picture with a row of the table. file: the picture if it is open."""
        self._compare_with(name, [self._value(column, row) for column in STAMPS], file)

    def _compare_with(
        self, name: str, listed: Sequence[int | None], file: BinaryIO | None = None
    ) -> None:
        """Compare a picture and its caption file with the values of STAMPS."""
        size, changed_at, suffix, caption_size, caption_changed_at = listed
        path = self.location(name)
        found = stamp_of(path if file is None else file.fileno())
        if found != (size, changed_at):
            raise changed_error(path, (size, changed_at), found)
        if suffix is None:
            return
        caption = os.path.splitext(path)[0] + CAPTION_SUFFIXES[suffix]
        found = stamp_of(caption)
        if found != (caption_size, caption_changed_at):
            raise changed_error(caption, (caption_size, caption_changed_at), found)

    def _row_of(self, name: str) -> int:
        names = self.table.column("name").chunk(0)
        row = bisect.bisect_left(names, name, key=lambda each: each.as_py())
        assert names[row].as_py() == name
        return row

    def _value(self, column: str, row: int) -> int | None:
        return self.table.column(column).chunk(0)[row].as_py()
