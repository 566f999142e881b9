"""The files of a folder, each compared with the folder's listing when it is opened."""

import bisect
import os
from collections.abc import Iterable
from datetime import datetime
from typing import BinaryIO

import pyarrow as pa

from sdtrain.data.folder_state import Stamp, stamp_of
from sdtrain.data.listing import CAPTION_SUFFIXES
from sdtrain.data.reader import ChangedFileError, Folder

FEW = 1000
"""Up to so many rows are looked up one by one; for more, the columns are read as a whole."""


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
            self._compare(name, file)
        except BaseException:
            file.close()
            raise
        return file

    def stamps(self, names: Iterable[str]) -> dict[str, Stamp]:
        """Return them as listed: a file that has changed since is noticed when it is opened."""
        names = list(names)
        if len(names) <= FEW:
            rows = [self._row_of(name) for name in names]
            table = self.table.take(rows)
        else:
            table = self.table
        columns = [table.column(column).to_pylist() for column in ("name", "bytes", "changed_at")]
        found = {name: (size, changed_at) for name, size, changed_at in zip(*columns, strict=True)}
        return {name: found[name] for name in names}

    def _compare(self, name: str, file: BinaryIO) -> None:
        row = self._row_of(name)
        status = os.fstat(file.fileno())
        listed = (self._value("bytes", row), self._value("changed_at", row))
        found = (status.st_size, status.st_mtime_ns)
        if found != listed:
            raise _changed_error(self.location(name), listed, found)
        suffix = self._value("caption_suffix", row)
        if suffix is None:
            return
        caption = os.path.splitext(self.location(name))[0] + CAPTION_SUFFIXES[suffix]
        listed = (self._value("caption_bytes", row), self._value("caption_changed_at", row))
        found = stamp_of(caption)
        if found != listed:
            raise _changed_error(caption, listed, found)

    def _row_of(self, name: str) -> int:
        names = self.table.column("name").chunk(0)
        row = bisect.bisect_left(names, name, key=lambda each: each.as_py())
        assert names[row].as_py() == name
        return row

    def _value(self, column: str, row: int) -> int | None:
        return self.table.column(column).chunk(0)[row].as_py()


def _changed_error(path: str, listed: Stamp, found: Stamp | None) -> ChangedFileError:
    now = "is gone" if found is None else f"has {_in_words(found)}"
    return ChangedFileError(
        f"The file {path!r} has changed since its folder was listed: it had {_in_words(listed)}, "
        f"and now {now}",
        key="data.refresh",
        remedy="Start again with data.refresh=true, which lists the folder anew.",
    )


def _in_words(stamp: Stamp) -> str:
    size, changed_at = stamp
    return f"{size} bytes of {datetime.fromtimestamp(changed_at / 1e9):%Y-%m-%d %H:%M:%S.%f}"
