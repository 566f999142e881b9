"""Whether a folder of pictures is still as it was when it was listed.

Each folder in it has a time at which a name was last added, renamed or removed; comparing these is
quick however many files there are. It does not show a file whose contents have changed: that is
seen when it is read, and at once in a folder with few files.
"""

import hashlib
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sdtrain.data.listing import Listing, list_folder
from sdtrain.errors import DataError

FEW_FILES = 40_000
"""Up to so many files are compared one by one at every start, which takes less than a second."""

CLOCK_STEP = 2 * 10**9
"""Nanoseconds by which the times of a file system may be rounded. A folder that was changed so
recently may be changed again without getting another time."""

Stamp = tuple[int, int]
"""(size in bytes, time of the last change in nanoseconds) of a file."""


@dataclass(frozen=True)
class FolderState:
    """What is compared at the next start.

    Attributes:
        folders: {relative name: time of its last change} of each folder.
        links: {relative name: real path} of each link to a folder.
        files: {relative name: stamp} of files that all rows depend on, None if one is missing.
        digest: of the names and stamps of all files, if they are few; None otherwise.
        is_settled: whether all folders had been left alone for CLOCK_STEP.
    """

    folders: dict[str, int]
    links: dict[str, str]
    files: dict[str, list[int] | None]
    digest: str | None
    is_settled: bool

    @classmethod
    def of(cls, folder: str, listing: Listing, files: Iterable[str], began: int) -> "FolderState":
        """Return the state of a folder that has just been listed.

        Args:
            folder: its absolute path.
            listing: what is in it.
            files: names of files that all rows depend on, such as the captions.
            began: when listing it began, in nanoseconds since 1970.
        """
        return cls(
            folders=listing.folders,
            links=listing.links,
            files={name: _stamp_list(folder, name) for name in files},
            digest=_digest(folder, listing),
            is_settled=max(listing.folders.values()) < began - CLOCK_STEP,
        )

    @classmethod
    def of_files(cls, stamps: Mapping[str, Stamp | None]) -> "FolderState":
        """Return the state of files, whatever folders they are in.

        stamps: {absolute path: stamp from before the file was read, None if it could not be read}.
        """
        return cls(
            folders={},
            links={},
            files={path: _as_list(stamp) for path, stamp in stamps.items()},
            digest=None,
            is_settled=True,
        )

    def holds(self, folder: str) -> bool:
        """Whether the folder is the same, as far as can be seen without reading its files."""
        for name, stamp in self.files.items():
            if _stamp_list(folder, name) != stamp:
                return False
        if self.digest is not None:
            return self.digest == _digest_now(folder)
        return self.is_settled and self._folders_hold(folder)

    def _folders_hold(self, folder: str) -> bool:
        try:
            for name, changed_at in self.folders.items():
                if os.stat(os.path.join(folder, name)).st_mtime_ns != changed_at:
                    return False
        except OSError:
            return False
        for name, real in self.links.items():
            if os.path.realpath(os.path.join(folder, name)) != real:
                return False
        return True


def stamp_of(file: str | int) -> Stamp | None:
    """Return the stamp of a file, or None if it cannot be read.

    file: its path, or the descriptor of the open file.
    """
    try:
        status = os.stat(file)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def has_few_files(listing: Listing) -> bool:
    """Whether the files of a folder are so few that they are compared at every start."""
    return len(listing.names) + len(listing.other_files) <= FEW_FILES


def now() -> int:
    """Return the time in nanoseconds since 1970."""
    return time.time_ns()


def _stamp_list(folder: str, name: str) -> list[int] | None:
    return _as_list(stamp_of(os.path.join(folder, name)))


def _as_list(stamp: Stamp | None) -> list[int] | None:
    """Return what json makes of a stamp."""
    return None if stamp is None else list(stamp)


def _digest_now(folder: str) -> str | None:
    """Return the digest of the folder's files, or None if they are too many or cannot be listed."""
    try:
        return _digest(folder, list_folder(folder))
    except (DataError, OSError):
        return None


def _digest(folder: str, listing: Listing) -> str | None:
    """Return a hash of all names in the folder and of the stamps of those that may be read."""
    if not has_few_files(listing):
        return None
    names = [*listing.names, *sorted(listing.other_files)]
    stamps = [(name, stamp_of(os.path.join(folder, name))) for name in names]
    links = sorted(listing.links.items())
    state = (stamps, sorted(listing.hidden), links, listing.dead_links, listing.repeated)
    return hashlib.sha256(repr(state).encode(errors="surrogateescape")).hexdigest()
