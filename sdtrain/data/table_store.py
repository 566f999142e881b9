"""Tables that a later start reads instead of making them again.

A table is an Arrow file, which is mapped into memory: it is not read before it is needed, and the
processes of a machine share it. A small json beside it holds its version and its checksum.
"""

import contextlib
import errno
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa

from sdtrain.files import atomic_file, remove_leftovers, sha256_of, write_text

VERSION = 2
"""Of the columns and facts of all stored tables. Tables of another version are made again."""

FACTS = b"sdtrain"
"""Key of the facts in the metadata of an Arrow schema."""

LOCK = "lock"

MEMO_SUFFIX = ".memo"

UNUSED_DAYS = 60
"""Tables that no start has read for so long are removed."""


@dataclass(frozen=True)
class StoredTable:
    """A table, and what else is known about it as plain values. facts: fit for json."""

    table: pa.Table
    facts: dict[str, Any]


class Memo:
    """Plain values that were worked out from a stored table, so that they need not be again.

    Args:
        path: of a json file.
        of: hash of the table; values of another one are forgotten.
    """

    def __init__(self, path: Path, of: str) -> None:
        self.path = path
        self.of = of

    def get(self, key: str) -> Any:
        """Return the value with this key, or None."""
        return self._values().get(key)

    def put(self, key: str, value: Any) -> None:
        """Remember a value fit for json, unless the file cannot be written."""
        values = self._values() | {key: value}
        with contextlib.suppress(OSError):
            write_text(self.path, json.dumps({"of": self.of, "values": values}) + "\n")

    def _values(self) -> dict[str, Any]:
        try:
            content = json.loads(self.path.read_bytes())
        except (OSError, ValueError):
            return {}
        if not isinstance(content, dict) or content.get("of") != self.of:
            return {}
        return content["values"]


class TableStore:
    """The tables in one folder, by name.

    Args:
        folder: made when it is needed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextlib.contextmanager
    def locked(self, on_wait: Callable[[], None]) -> Iterator[None]:
        """Let no other process enter the block meanwhile, but wait until this one leaves it.

        Where the folder cannot be written or its file system has no locks, none is held: two
        processes may then do the same work, and the table of the last one stays.

        on_wait: called before a wait.
        """
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):
                self.folder.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context(open(self.folder / LOCK, "a", encoding="utf-8"))
                _lock(file, on_wait)
                remove_leftovers(self.folder)
            yield

    def read(self, name: str) -> StoredTable | None:
        """Return a table, or None if there is none that is whole and of this version."""
        path = self._path(name)
        record = self._record(name)
        try:
            wanted = {"version": VERSION, "sha256": sha256_of(path)}
            if json.loads(record.read_bytes()) != wanted:
                return None
            with contextlib.suppress(OSError):  # another user's, or on a read-only disk
                os.utime(record)
            return _open(path)
        except (OSError, ValueError):  # ValueError: not json, or not UTF-8
            return None

    def write(self, name: str, stored: StoredTable) -> None:
        """Write the file of a table, with its facts.

        Raises OSError, after which a table that was stored under this name before may be lost.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(name)
        facts = json.dumps(stored.facts).encode()
        table = stored.table.combine_chunks().replace_schema_metadata({FACTS: facts})
        with atomic_file(path) as temporary, pa.OSFile(str(temporary), "wb") as sink:
            with pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)
        record = {"version": VERSION, "sha256": sha256_of(path)}
        write_text(self._record(name), json.dumps(record) + "\n")

    def memo(self, name: str, of: str) -> Memo:
        """Return what is remembered about a table. of: a hash of its rows."""
        return Memo(self.folder / f"{name}{MEMO_SUFFIX}", of)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.arrow"

    def _record(self, name: str) -> Path:
        return self.folder / f"{name}.json"


def _lock(file: TextIO, on_wait: Callable[[], None]) -> None:
    """Lock a file; it is unlocked when it is closed. Raises OSError if it cannot be locked."""
    try:
        # A POSIX lock, because the workers of a data loader do not inherit it.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise
        on_wait()
        fcntl.lockf(file, fcntl.LOCK_EX)


def _open(path: Path) -> StoredTable:
    table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    facts = json.loads(table.schema.metadata[FACTS])
    return StoredTable(table, facts)


def remove_unused(root: Path) -> None:
    """Remove from the stores below `root` the tables that were not read for UNUSED_DAYS."""
    oldest = time.time() - UNUSED_DAYS * 24 * 3600
    for folder in root.iterdir():
        with contextlib.suppress(OSError):
            for record in folder.glob("*.json"):
                if record.stat().st_mtime < oldest:
                    for suffix in (".arrow", MEMO_SUFFIX):
                        record.with_suffix(suffix).unlink(missing_ok=True)
                    record.unlink()
