"""The headers of files, read again only where a file has changed since the last time."""

import os
from typing import Any

import PIL
import pyarrow as pa

from sdtrain.data.folder_state import Stamp, stamp_of
from sdtrain.data.headers import FileHeader, read_header
from sdtrain.data.reader import Folder
from sdtrain.data.table_store import StoredTable

COLUMNS = {
    "name": pa.large_string(),
    "bytes": pa.int64(),
    "changed_at": pa.int64(),
    "width": pa.int32(),
    "height": pa.int32(),
    "has_frames": pa.bool_(),
    "fingerprint": pa.large_string(),
}


class KnownHeaders:
    """Reads the headers of pictures in a folder, and keeps those that could be read.

    Args:
        folder: the files.
        stored: what `to_stored` returned an earlier time; None reads every file.
    """

    def __init__(self, folder: Folder, stored: StoredTable | None) -> None:
        self.folder = folder
        self.has_new = False
        """Whether a header was read that was not known."""
        self._values: dict[str, list[Any]] = {name: [] for name in COLUMNS}
        self._earlier = None
        self._row_of: dict[str, int] = {}
        # Another version of Pillow may read another header.
        if stored is not None and stored.facts["pillow"] == PIL.__version__:
            self._earlier = stored.table
            names = stored.table.column("name").to_pylist()
            self._row_of = dict(zip(names, range(len(names)), strict=True))

    def __call__(self, name: str) -> FileHeader:
        """Return the header of a picture. Raises as `read_header` does."""
        stamp = stamp_of(os.path.join(self.folder.path, name))
        header = self._remembered(name, stamp)
        if header is None:
            header = read_header(self.folder, name)
            self.has_new = True
        if stamp is not None:
            self._keep(name, stamp, header)
        return header

    def to_stored(self) -> StoredTable:
        """Return a table of all headers that were read or remembered, in that order."""
        columns = {}
        for name, values in self._values.items():
            columns[name] = pa.array(values, COLUMNS[name])
        return StoredTable(pa.table(columns), {"pillow": PIL.__version__})

    def _remembered(self, name: str, stamp: Stamp | None) -> FileHeader | None:
        """Return the header that the file had, if it has not changed since."""
        row = self._row_of.get(name)
        if row is None:
            return None
        earlier = {}
        for column in COLUMNS:
            earlier[column] = self._earlier.column(column).chunk(0)[row].as_py()
        if (earlier["bytes"], earlier["changed_at"]) != stamp:
            return None
        size = (earlier["width"], earlier["height"])
        return FileHeader(size, earlier["has_frames"], earlier["fingerprint"])

    def _keep(self, name: str, stamp: Stamp, header: FileHeader) -> None:
        row = (name, *stamp, *header.size, header.has_frames, header.fingerprint)
        for values, value in zip(self._values.values(), row, strict=True):
            values.append(value)
