"""Pictures in WebDataset tar files, read in place.

A tar file is a sequence of files, each behind a header with its name and size. An index of their
offsets makes each of them readable at random. Nothing is ever unpacked: the name of a member is
never opened as a path.
"""

import io
import json
import os
import posixpath
import tarfile
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np

from sdtrain.data.decode import picture_suffixes
from sdtrain.data.folder_state import Stamp
from sdtrain.data.listing import REFUSED_SUFFIXES, suffix_of
from sdtrain.data.stored import (
    FileStamps,
    NameIndex,
    check_names,
    file_names,
    folders_of,
    unreadable_error,
)
from sdtrain.errors import DataError

BLOCK = 512
"""Bytes of a header; everything begins at a multiple of it."""

COMPRESSIONS = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
"""{first bytes: name} of the compressions of tar files."""

TEXT_SUFFIXES = (".txt", ".cls", ".json")
LARGEST_TEXT = 2**20
"""Bytes of a member with a caption."""


class MemberFile(io.RawIOBase):
    """A part of an open file, as a file of its own. Closing it closes the whole file."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        super().__init__()
        self._file = file
        self._start = start
        self._size = size
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        self._place = max(0, base + offset)
        return self._place

    def readinto(self, buffer: memoryview) -> int:
        count = max(0, min(len(buffer), self._size - self._place))
        self._file.seek(self._start + self._place)
        read = self._file.readinto(memoryview(buffer)[:count])
        self._place += read
        return read

    def close(self) -> None:
        self._file.close()
        super().close()


@dataclass
class _Index:
    """Members found in all tar files, in their order.

    Attributes:
        names, files, offsets, sizes: of the pictures; a file is a place in the list of tar files.
        texts: {(file, name without suffix): {column: value}} of the members beside them.
        suffixes: of all members.
        ignored: counts of members that may be pictures and are not read, by kind.
    """

    names: list[str] = field(default_factory=list)
    files: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    texts: dict[tuple[int, str], dict[str, Any]] = field(default_factory=dict)
    suffixes: set[str] = field(default_factory=set)
    ignored: Counter[str] = field(default_factory=Counter)


class TarFiles:
    """The pictures in tar files. Implements `stored.Store`.

    A picture is called by the name of its member; by FILE:MEMBER if two tar files have a member of
    one name. Beside it, under the same name with another suffix, may be a .txt with its captions (a
    column `txt`), a .cls with its label (a column `cls`) and a .json whose fields are columns.

    Args:
        paths: of the tar files.
        suffix: of the pictures, such as "jpg"; None takes every picture.
        other: suffix of members that are no pictures, such as "depth.png"; None if there are none.

    Raises DataError for a file that is no tar file, is compressed or damaged.
    """

    default_columns = {
        "caption": ("txt", "text", "caption"),
        "label": ("cls", "label"),
        "weight": ("weight",),
    }

    def __init__(
        self, paths: Sequence[str], suffix: str | None = None, other: str | None = None
    ) -> None:
        self._stamps = FileStamps(paths)
        self.paths = self._stamps.paths
        self.files = self._stamps.listed
        self.identity = self._stamps.identity
        index = _Index()
        for place, path in enumerate(self.paths):
            _read_tar(path, place, suffix, other, index)
        if not index.names:
            raise _no_pictures(self.paths, suffix, index.suffixes)
        self._texts = [_texts_of(index, place) for place in range(len(index.names))]
        columns: dict[str, None] = {}
        for values in self._texts:
            columns.update(dict.fromkeys(values))
        self.columns = list(columns)
        self.notes = _notes(index)
        self._members = index.names
        self.names = _picture_names(index, self.paths)
        self._places = NameIndex(self.names)
        self._file_of = np.array(index.files, np.int32)
        self._offsets = np.array(index.offsets, np.int64)
        self._sizes = np.array(index.sizes, np.int64)

    def values(self, column: str) -> list[Any]:
        return [values.get(column) for values in self._texts]

    def rows(self) -> Sequence[Hashable]:
        keys = [_key_of(name) for name in self._members]
        return list(zip(self._file_of.tolist(), keys, strict=True))

    def folders(self) -> list[str]:
        return folders_of(self._members)

    def forget_values(self) -> None:
        self._texts = []
        self._members = []

    def open(self, name: str) -> BinaryIO:
        place = self._places.place(name)
        number = int(self._file_of[place])
        path = self.paths[number]
        try:
            # Opened for each picture, so that forked processes share no position in a file.
            file = open(path, "rb", buffering=0)
        except OSError as error:
            raise unreadable_error(path, f"cannot be opened: {error.strerror}") from error
        try:
            self._stamps.check(number, file.fileno())
        except BaseException:
            file.close()
            raise
        part = MemberFile(file, int(self._offsets[place]), int(self._sizes[place]))
        return io.BufferedReader(part)

    def stamps(self, names: Iterable[str]) -> dict[str, Stamp]:
        names = list(names)
        return self._stamps.of(names, self._file_of[self._places.places(names)])

    def check_unchanged(self, names: Iterable[str]) -> None:
        self._stamps.check_all()

    def location(self, name: str) -> str:
        return f"{self.paths[self._file_of[self._places.place(name)]]}: {name}"


def _picture_names(index: _Index, paths: Sequence[str]) -> list[str]:
    names = index.names
    if len(set(names)) < len(names):
        files = file_names(paths)
        names = [f"{files[file]}:{name}" for file, name in zip(index.files, names, strict=True)]
    check_names(names)
    return names


def _notes(index: _Index) -> list[str]:
    if not index.ignored:
        return []
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(index.ignored.items()))
    return [f"data.path: not read in the tar files: {counts}."]


def _texts_of(index: _Index, place: int) -> dict[str, Any]:
    """Return the values beside a picture: those under its whole name without the suffix, else under
    its key.
    """
    name = index.names[place]
    for key in (posixpath.splitext(name)[0], _key_of(name)):
        values = index.texts.get((index.files[place], key))
        if values is not None:
            return values
    return {}


def _key_of(name: str) -> str:
    """Return the part of a member's name before the first dot, which WebDataset calls the key."""
    folder, base = posixpath.split(name)
    return posixpath.join(folder, base.partition(".")[0])


def _read_tar(path: str, place: int, wanted: str | None, other: str | None, index: _Index) -> None:
    """Add the members of a tar file to the index.

    Args:
        path: of the tar file.
        place: of it among all.
        wanted: suffix of the pictures, or None for all.
        other: suffix of members that are no pictures, or None.
        index: extended in place.
    """
    with _open_tar(path) as tar:
        for member in _members(tar, path):
            name = posixpath.normpath(member.name)
            suffix = suffix_of(name)
            index.suffixes.add(suffix)
            if not _is_picture(name, wanted, other):
                if suffix in TEXT_SUFFIXES and member.isreg():
                    values = index.texts.setdefault((place, posixpath.splitext(name)[0]), {})
                    values.update(_read_text(tar, member, path))
            elif posixpath.basename(name).startswith("."):
                index.ignored["hidden"] += 1
            elif not member.isreg() or member.issparse():
                index.ignored["links or sparse files"] += 1
            else:
                index.names.append(name)
                index.files.append(place)
                index.offsets.append(member.offset_data)
                index.sizes.append(member.size)


def _is_picture(name: str, wanted: str | None, other: str | None) -> bool:
    """Whether a member is a picture.

    wanted: the only suffix that is; None for all of Pillow's. other: a suffix that is not.
    """
    suffix = suffix_of(name)
    suffixes = (suffix.lstrip("."), posixpath.basename(name).partition(".")[2].lower())
    if other is not None and other.lower().lstrip(".") in suffixes:
        return False
    if wanted is None:
        return suffix in picture_suffixes() or suffix in REFUSED_SUFFIXES
    return wanted.lower().lstrip(".") in suffixes


def _open_tar(path: str) -> tarfile.TarFile:
    try:
        with open(path, "rb") as file:
            start = file.read(8)
        for magic, compression in COMPRESSIONS.items():
            if start.startswith(magic):
                raise unreadable_error(
                    path,
                    f"is compressed ({compression}), and cannot be read in place",
                    "Decompress it: pictures are compressed already. Or change data.path.",
                )
        return tarfile.open(path, "r:")
    except (OSError, tarfile.TarError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise unreadable_error(path, f"cannot be read as a tar file: {reason}") from error


def _members(tar: tarfile.TarFile, path: str) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar file that are no folders.

    Raises DataError if it is damaged or cut short.
    """
    try:
        while (member := tar.next()) is not None:
            tar.members.clear()  # or it would keep all of them
            if not member.isdir():
                yield member
        # tarfile also stops at a header that it cannot read.
        tar.fileobj.seek(tar.offset)
        end = tar.fileobj.read(BLOCK)
    except (OSError, tarfile.TarError) as error:
        raise unreadable_error(path, f"is damaged or cut short: {error}") from error
    if end.strip(b"\0") or len(end) < BLOCK:
        raise unreadable_error(
            path, f"is damaged or cut short at byte {tar.offset}: its end marker is missing"
        )


def _read_text(tar: tarfile.TarFile, member: tarfile.TarInfo, path: str) -> dict[str, Any]:
    """Return {column: value} of a member with text. Raises DataError if it cannot be read."""
    name = f"{path}: {member.name}"
    if member.size > LARGEST_TEXT:
        reason = f"has {member.size} bytes; a caption has at most {LARGEST_TEXT}"
        raise unreadable_error(name, reason)
    try:
        content = tar.extractfile(member).read()
    except (OSError, tarfile.TarError) as error:
        raise unreadable_error(path, f"is damaged or cut short: {error}") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        reason = f"is not UTF-8: byte {error.start} is 0x{byte:02x}"
        raise unreadable_error(name, reason) from error
    suffix = suffix_of(member.name)
    if suffix == ".json":
        return _parse_json(text, name)
    if suffix == ".cls":
        return {"cls": text.strip()}
    return {"txt": text.splitlines()}


def _parse_json(text: str, name: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise unreadable_error(name, f"is not JSON that can be read: {error}") from error
    if not isinstance(values, dict):
        raise unreadable_error(name, f"must be a JSON object, and is {text[:60]}")
    return values


def _no_pictures(paths: Sequence[str], suffix: str | None, found: set[str]) -> DataError:
    seen = ", ".join(sorted(filter(None, found))) or "nothing"
    if suffix is not None:
        return DataError(
            f"is how no member of {paths[0]!r} ends; they end in {seen}",
            key="data.columns.image",
            value=suffix,
            remedy="Change data.columns.image.",
        )
    return unreadable_error(paths[0], f"holds no pictures; its members end in {seen}")
