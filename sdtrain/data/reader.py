"""Read the pictures of a data set by name, wherever their files are stored."""

import os
import stat
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import BinaryIO, Protocol

from PIL import Image
from torch import Tensor

from sdtrain.data.crop import resize_to_cover
from sdtrain.data.decode import WHITE, PictureFile, open_picture
from sdtrain.data.folder_state import Stamp, stamp_of
from sdtrain.errors import DataError

CACHE_BYTES = 256 * 2**20
"""Decoded pictures that one process keeps."""


class ChangedFileError(DataError):
    """A file is not the one that was listed."""


def changed_error(path: str, listed: Stamp | None, found: Stamp | None) -> ChangedFileError:
    """Return the error for a file with another stamp than it was listed with."""
    return ChangedFileError(
        f"The file {path!r} has changed since the data were listed: it {_in_words(listed, 'had')}, "
        f"and now {_in_words(found, 'has')}",
        key="data.refresh",
        remedy="Start again with data.refresh=true, which lists the data anew.",
    )


def _in_words(stamp: Stamp | None, verb: str) -> str:
    if stamp is None:
        return f"{verb} no size, because it cannot be read"
    size, changed_at = stamp
    when = datetime.fromtimestamp(changed_at / 1e9)
    return f"{verb} {size} bytes of {when:%Y-%m-%d %H:%M:%S.%f}"


class Source(Protocol):
    """Where the encoded files of a data set are. Each picture has a name of its own.

    identity: names the source, such as its path.
    """

    identity: str

    def open(self, name: str) -> BinaryIO:
        """Open the encoded file of a picture. Raises ChangedFileError if it is not as it was
        listed, DataError if it cannot be opened.
        """
        ...

    def location(self, name: str) -> str:
        """Return the words by which an error names the picture, such as its path."""
        ...

    def stamps(self, names: Iterable[str]) -> dict[str, Stamp]:
        """Return {name: size and time of the file that the picture is in}, as it was listed if it
        is part of a listing, without files that are gone.
        """
        ...

    def check_unchanged(self, names: Iterable[str]) -> None:
        """Raise ChangedFileError if a file of these pictures is not as it was listed."""
        ...


class Reader(Protocol):
    """Reads the pictures of a data set by name."""

    def __call__(self, name: str, size: tuple[int, int] | None = None) -> Tensor:
        """Return the pixels, uint8 [3, h, w]: the smallest that cover `size`, (width, height), or
        else a square of image_size. Raises DataError.
        """
        ...

    def read_bytes(self, name: str) -> bytes:
        """Return the encoded file, for a hash of its content. Raises DataError."""
        ...


class Folder:
    """The files in a folder. A name is a path relative to it."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.identity = path

    def open(self, name: str) -> BinaryIO:
        path = self.location(name)
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would block
                raise DataError(f"The picture {path!r} is not a file", key="data.path")
            return open(path, "rb")
        except OSError as error:
            problem = f"The picture {path!r} cannot be opened: {error.strerror}"
            raise DataError(problem, key="data.path") from error

    def location(self, name: str) -> str:
        return os.path.join(self.path, name)

    def stamps(self, names: Iterable[str]) -> dict[str, Stamp]:
        found = {}
        for name in names:
            stamp = stamp_of(self.location(name))
            if stamp is not None:
                found[name] = stamp
        return found

    def check_unchanged(self, names: Iterable[str]) -> None:
        """Do nothing: these files are not part of a listing."""


class PictureReader:
    """Reads the pictures of a source, and scales them to cover a size.

    Keeps what it scaled, up to CACHE_BYTES in each process. A full cache neither adds nor evicts
    entries: an epoch visits all pictures in turn, so the oldest entry is the one needed next.
    Implements `Reader`.

    Args:
        source: the encoded files.
        image_size: side of the square that is covered if no other size is asked for, in pixels.
        background: (red, green, blue) in 0..255 behind transparent pixels.
    """

    def __init__(self, source: Source, image_size: int, background: Sequence[int] = WHITE) -> None:
        self.source = source
        self.image_size = image_size
        self.background = tuple(background)
        self._cache: dict[tuple[str, tuple[int, int] | None], Tensor] = {}
        self._free = CACHE_BYTES

    def __call__(self, name: str, size: tuple[int, int] | None = None) -> Tensor:
        if (name, size) in self._cache:
            return self._cache[name, size]
        pixels = resize_to_cover(self.picture(name), size or (self.image_size, self.image_size))
        if pixels.nbytes <= self._free:
            self._cache[name, size] = pixels
            self._free -= pixels.nbytes
        return pixels

    def picture(self, name: str) -> Image.Image:
        """Return the picture, upright, as RGB in its own size. Raises DataError."""
        with self.source.open(name) as file:
            located = PictureFile(file, self.source.location(name))
            return open_picture(located, background=self.background)

    def read_bytes(self, name: str) -> bytes:
        with self.source.open(name) as file:
            try:
                return file.read()
            except OSError as error:
                problem = f"The picture {self.source.location(name)!r} cannot be read: "
                raise DataError(problem + error.strerror, key="data.path") from error

    def __reduce__(self):
        # Without the cache: a worker that is started afresh fills its own.
        return PictureReader, (self.source, self.image_size, self.background)
