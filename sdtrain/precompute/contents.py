"""Remember the hashes of the files of pictures, so that a file is read again only if it changed."""

import hashlib
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

from sdtrain.console import warn
from sdtrain.data.folder_state import Stamp
from sdtrain.errors import StorageError

TIMEOUT = 60.0
"""Seconds to wait for another process that is writing."""

SCHEMA = """
CREATE TABLE IF NOT EXISTS contents (
    source TEXT, name TEXT, size INTEGER, mtime_ns INTEGER, sha256 BLOB,
    PRIMARY KEY (source, name)
) WITHOUT ROWID
"""


class Contents:
    """The known hashes of one source of pictures, in an SQLite file that several processes share.

    Args:
        path: of the file; it need not exist.
        source: where the pictures are, such as the path of their folder. Its hash is stored: a path
            need not be UTF-8, but a text in the file must be.
        key: says where the file is, for errors.
    """

    def __init__(self, path: Path, source: str, key: str = "data.cache") -> None:
        self.path = path
        self.key = key
        self._source = hashlib.sha256(source.encode(errors="surrogateescape")).hexdigest()

    def known(self, stamps: Mapping[str, Stamp]) -> dict[str, bytes]:
        """Return {name: SHA-256} of the files that were hashed with the same size and time.

        stamps: {name: present size and time}. A damaged file counts as empty.
        """
        if not self.path.is_file():
            return {}
        found = {}
        try:
            with closing(self._connect("ro")) as connection:
                for name, size, mtime_ns, digest in self._rows(connection, stamps):
                    if stamps.get(name) == (size, mtime_ns):
                        found[name] = digest
        except sqlite3.Error as error:
            warn(f"{self.path} cannot be read ({error}): all pictures are hashed again.")
        return found

    def _rows(self, connection: sqlite3.Connection, names: Iterable[str]) -> Iterator[tuple]:
        """Yield the rows of the source: of a few names only if there are few."""
        query = "SELECT name, size, mtime_ns, sha256 FROM contents WHERE source = ?"
        names = list(names)
        if len(names) > 100:
            yield from connection.execute(query, [self._source])
            return
        for name in names:
            yield from connection.execute(f"{query} AND name = ?", [self._source, name])

    def add(self, hashed: Mapping[str, tuple[Stamp, bytes]]) -> None:
        """Store {name: (size and time, SHA-256)}. Raises StorageError."""
        rows = []
        for name, ((size, mtime_ns), digest) in hashed.items():
            rows.append((self._source, name, size, mtime_ns, digest))
        if not rows:
            return
        with _storage_errors(self.path, self.key):
            try:
                self._insert(rows)
            except sqlite3.OperationalError:  # a full disk, or a file that may not be written
                raise
            except sqlite3.DatabaseError:  # no database, or a damaged one
                self.path.unlink(missing_ok=True)
                self._insert(rows)

    def _insert(self, rows: list[tuple]) -> None:
        with closing(self._connect("rwc")) as connection, connection:
            connection.execute(SCHEMA)
            connection.executemany("INSERT OR REPLACE INTO contents VALUES (?, ?, ?, ?, ?)", rows)

    def _connect(self, mode: str) -> sqlite3.Connection:
        return sqlite3.connect(f"{self.path.absolute().as_uri()}?mode={mode}", TIMEOUT, uri=True)


@contextmanager
def _storage_errors(path: Path, key: str) -> Iterator[None]:
    """Turn an error of the database into a StorageError."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise StorageError(
            f"{path} cannot be written: {error}",
            key=key,
            remedy=f"Free space, or set {key} to another folder.",
        ) from error
