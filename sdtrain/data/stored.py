"""What the formats of stored data sets (tar, Parquet, Arrow) have in common: named pictures and
columns of values beside them.
"""

import copy
import hashlib
import os
import posixpath
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sdtrain.data.folder_state import Stamp, stamp_of
from sdtrain.data.listing import shortened
from sdtrain.data.reader import Source, changed_error
from sdtrain.errors import DataError


class Store(Source, Protocol):
    """A stored data set. It is a source of the encoded pictures.

    names: of the pictures, in the order in which they are stored. columns: names of the columns
    beside them. default_columns: {role: columns that have it by default}; the first that exists is
    taken. notes: lines for the user about what is not read. files: {path: stamp} of the files that
    hold it, from before they were read.
    """

    names: Sequence[str]
    columns: Sequence[str]
    default_columns: Mapping[str, Sequence[str]]
    notes: Sequence[str]
    files: Mapping[str, Stamp | None]

    def values(self, column: str) -> list[Any]:
        """Return the values of a column, in the order of `names`; None where there is none."""
        ...

    def rows(self) -> Sequence[Hashable]:
        """Return the row of each picture, in the order of `names`: the same in all stores of one
        data set, whatever their column of pictures.
        """
        ...

    def folders(self) -> list[str]:
        """Return the folder of each picture, as named in its file, in the order of `names`; "" for
        all if they are not named there, because the folder of a file of many is no class.
        """
        ...

    def forget_values(self) -> None:
        """Free the memory of what only `values`, `rows` and `folders` need, which are not called
        again.
        """
        ...


FEW = 1000
"""Up to so many names are looked up one by one."""


class NameIndex:
    """Finds the place of a name among many, which are in Arrow memory: forked processes share it.

    names: all different.
    """

    def __init__(self, names: Sequence[str]) -> None:
        order = np.array(sorted(range(len(names)), key=names.__getitem__), np.int64)
        self._sorted = pa.array(names, pa.large_string()).take(pa.array(order))
        self._order = order

    def place(self, name: str) -> int:
        """Return the place of a name. Raises KeyError if there is none."""
        low = 0
        high = len(self._sorted)
        while low < high:
            middle = (low + high) // 2
            if self._sorted[middle].as_py() < name:
                low = middle + 1
            else:
                high = middle
        if low == len(self._sorted) or self._sorted[low].as_py() != name:
            raise KeyError(name)
        return int(self._order[low])

    def places(self, names: Sequence[str]) -> np.ndarray:
        """Return the places of names that exist, int64 [N]."""
        if len(names) <= FEW:
            return np.array([self.place(name) for name in names], np.int64)
        found = pc.index_in(pa.array(names, pa.large_string()), value_set=self._sorted)
        return self._order[found.to_numpy()]


class FileStamps:
    """The files of a stored data set, with the sizes and times that they have now: before they are
    read.

    Args:
        paths: of the files.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self.listed = {path: stamp_of(path) for path in paths}
        self.paths = list(self.listed)

    def in_folder(self, folder: str) -> "FileStamps":
        """Return the files that are in a folder and in none below it, with the same stamps."""
        inside = copy.copy(self)
        inside.paths = [path for path in self.paths if os.path.dirname(path) == folder]
        inside.listed = {path: self.listed[path] for path in inside.paths}
        return inside

    @property
    def identity(self) -> str:
        """What names the files together."""
        digest = hashlib.sha256("\n".join(self.paths).encode(errors="surrogateescape"))
        return f"{self.paths[0]} {len(self.paths)} {digest.hexdigest()[:32]}"

    def of(self, names: Sequence[str], files: Sequence[int]) -> dict[str, Stamp]:
        """Return the stamp of the file of each picture, without files that could not be read.

        files: the number of the file of each.
        """
        stamps = [self.listed[path] for path in self.paths]
        found = {}
        for name, file in zip(names, files, strict=True):
            if stamps[file] is not None:
                found[name] = stamps[file]
        return found

    def check(self, file: int, descriptor: int | None = None) -> None:
        """Raise ChangedFileError unless a file has the stamp that it was listed with.

        Args:
            file: its number.
            descriptor: of the file if it is open; otherwise what is at its path now is compared.
        """
        path = self.paths[file]
        found = stamp_of(path if descriptor is None else descriptor)
        if found != self.listed[path]:
            raise changed_error(path, self.listed[path], found)

    def check_all(self) -> None:
        """Raise ChangedFileError unless all files have the stamps that they were listed with."""
        for file in range(len(self.paths)):
            self.check(file)


def are_names(paths: Sequence[str | None]) -> bool:
    """Whether the paths that are stored with pictures can be their names: all have one of their
    own.
    """
    return all(paths) and len(set(paths)) == len(paths)


def folders_of(names: Sequence[str]) -> list[str]:
    """Return the folder of each name, "" for the outermost."""
    return [posixpath.dirname(name) for name in names]


def place_of_row(file: str, row: int) -> str:
    """Return FILE:ROW, with as many digits as make the names sort like the rows."""
    return f"{file}:{row:09}"


def check_names(names: Sequence[str]) -> None:
    """Raise DataError for names that are not printable, or that two pictures have."""
    unprintable = [ascii(name) for name in names if not name.isprintable()]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    for bad, problem in ((unprintable, "are not printable text"), (repeated, "occur twice")):
        if bad:
            raise DataError(
                f"{len(bad)} names of pictures in data.path {problem}: {shortened(bad)}",
                key="data.path",
                remedy="Rename the pictures, or change data.path.",
            )


def file_names(paths: Sequence[str]) -> list[str]:
    """Return the names of the files, or if two have the same one, the paths relative to the folder
    that contains all of them.
    """
    names = [os.path.basename(path) for path in paths]
    if len(set(names)) == len(names):
        return names
    folder = os.path.commonpath([os.path.dirname(path) for path in paths])
    return [os.path.relpath(path, folder).replace(os.sep, "/") for path in paths]


def unreadable_error(path: str, reason: str, remedy: str = "") -> DataError:
    """Return the error for a file of a stored data set. reason: what is wrong with it."""
    return DataError(
        f"The file {path!r} {reason}",
        key="data.path",
        remedy=remedy or "Repair or remove it, or change data.path.",
    )
