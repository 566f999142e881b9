"""List the pictures of a folder, and summarise the files that are not read as pictures.

Links to folders are followed. Nothing is ignored without being counted.
"""

import os
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from sdtrain.data.decode import picture_suffixes
from sdtrain.errors import DataError

REFUSED_SUFFIXES = (".heic", ".heif", ".jxl")
"""Suffixes of pictures that Pillow cannot open. They are listed, so that an error names them."""

CAPTION_SUFFIXES = (".txt", ".TXT")

LONGEST_SUFFIX = 12
"""In characters, with the dot. Anything longer is not a suffix, but part of a name with a dot."""


@dataclass
class Listing:
    """The contents of a folder and its subfolders. Names are relative, with forward slashes.

    names: the pictures, sorted. other_files: the files that are not pictures. hidden: files and
    folders whose names begin with a dot. dead_links: how many links lead nowhere. repeated: how
    many folders were skipped because they are read under another name or contain this one.
    roots: the real paths of the folder and of the folders that links lead to; a file outside all
    of them is not part of the data set. folders: {relative name: time of the last change, in
    nanoseconds} of each folder that was read, "." for the folder itself; the times are from before
    it was read. links: {relative name: real path} of the links to folders.
    """

    names: list[str] = field(default_factory=list)
    other_files: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    dead_links: int = 0
    repeated: int = 0
    roots: list[str] = field(default_factory=list)
    folders: dict[str, int] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    _contained: dict[str, bool] = field(default_factory=dict, repr=False, compare=False)

    def contains(self, path: str) -> bool:
        """Return whether `path`, with links resolved, lies in the folder or in a linked one."""
        folder, name = os.path.split(path)
        if name in ("", ".", "..") or os.path.islink(path):
            return self._contains_real(os.path.realpath(path))
        # Whatever is in a folder that lies inside does so too. Resolving each path of a million
        # would take 47 seconds.
        if folder not in self._contained:
            self._contained[folder] = self._contains_real(os.path.realpath(folder))
        return self._contained[folder]

    def _contains_real(self, real: str) -> bool:
        return any(lies_in(real, root) for root in self.roots)

    def summarise_ignored(self, read: Collection[str]) -> str:
        """Count the files that are not in `read` by suffix, as in "3 .psd, 2 hidden"; "" if none.

        read: relative names of the files that were read.
        """
        kinds = Counter(_kind(name) for name in self.other_files if name not in read)
        counts = [f"{count} {kind}" for kind, count in sorted(kinds.items())]
        hidden = [name for name in self.hidden if name not in read]
        for count, kind in (
            (len(hidden), "hidden"),
            (self.dead_links, "links that lead nowhere"),
            (self.repeated, "links to folders that are read already or that contain this one"),
        ):
            if count:
                counts.append(f"{count} {kind}")
        return ", ".join(counts)


def list_folder(folder: str) -> Listing:
    """Walk a folder, then the folders that links in it lead to.

    Each real folder is read once, under its name without a link if it has one, so a link to a
    parent folder causes no endless loop. Raises DataError if a folder cannot be listed or a
    picture's name is not printable.
    """
    listing = Listing(roots=[os.path.realpath(folder)])
    listing.folders["."] = _changed_at(folder)
    seen = {listing.roots[0]}
    links = sorted(_walk(folder, "", listing, seen))
    while links:
        link = links.pop(0)
        real = os.path.realpath(os.path.join(folder, link))
        listing.links[link] = real
        # Following a link to a parent folder would add files that lie beside the data set.
        if real in seen or lies_in(listing.roots[0], real):
            listing.repeated += 1
            continue
        seen.add(real)
        listing.roots.append(real)
        listing.folders[link] = _changed_at(real)
        links += sorted(_walk(folder, link, listing, seen))
    listing.names.sort()
    _check_names(folder, listing.names)
    return listing


def suffix_of(name: str) -> str:
    """Return the lower-case suffix with its dot, or "" if the name has none."""
    return os.path.splitext(name)[1].lower()


def lies_in(path: str, folder: str) -> bool:
    """Return whether an absolute path is a folder or lies in it."""
    return os.path.commonpath([path, folder]) == folder


def _kind(name: str) -> str:
    """Return the words under which an ignored file is counted."""
    suffix = suffix_of(name)
    if suffix in CAPTION_SUFFIXES:
        return f"{suffix} that belong to no picture"
    is_suffix = suffix.isprintable() and 1 < len(suffix) <= LONGEST_SUFFIX
    return suffix if is_suffix else "without a suffix"


def _walk(folder: str, below: str, listing: Listing, seen: set[str]) -> Iterator[str]:
    """Add the files of `folder`/`below` to `listing` and yield the links to folders in it.

    seen: real paths of the folders read so far; extended in place.
    """
    suffixes = {*picture_suffixes(), *REFUSED_SUFFIXES}

    def raise_unreadable(error: OSError) -> None:
        raise DataError(
            f"data.path={folder}: {error.filename!r} cannot be listed: {error.strerror}",
            key="data.path",
            remedy="Change its permissions, or data.path.",
        ) from error

    for parent, folders, files in os.walk(os.path.join(folder, below), onerror=raise_unreadable):
        inside = os.path.relpath(parent, folder)
        kept = []
        for name in folders:
            path = os.path.join(parent, name)
            if name.startswith("."):
                listing.hidden.append(_relative(inside, name))
            elif os.path.islink(path):
                yield _relative(inside, name)
            elif (real := os.path.realpath(path)) in seen:
                listing.repeated += 1
            else:
                seen.add(real)
                listing.folders[_relative(inside, name)] = _changed_at(path)
                kept.append(name)
        folders[:] = kept
        for name in files:
            if name.startswith("."):
                listing.hidden.append(_relative(inside, name))
            elif suffix_of(name) in suffixes:
                listing.names.append(_relative(inside, name))
            elif not os.path.exists(os.path.join(parent, name)):
                listing.dead_links += 1
            else:
                listing.other_files.append(_relative(inside, name))


def _changed_at(folder: str) -> int:
    """Return when something was last added to a folder, renamed or removed, in nanoseconds; 0 if
    that cannot be found out, which listing the folder then reports.
    """
    try:
        return os.stat(folder).st_mtime_ns
    except OSError:
        return 0


def _relative(inside: str, name: str) -> str:
    return name if inside == "." else "/".join((*inside.split(os.sep), name))


def _check_names(folder: str, names: Sequence[str]) -> None:
    """Raise DataError for names that are not UTF-8 or hold line breaks."""
    unprintable = [ascii(name) for name in names if not name.isprintable()]
    if unprintable:
        raise DataError(
            f"{len(unprintable)} file names in data.path={folder} are not printable text: "
            f"{shortened(unprintable)}",
            key="data.path",
            remedy="Rename the files, or change data.path.",
        )


def shortened(names: Sequence[str]) -> str:
    """Join up to three names and say how many more there are: "a, b, c and 5 more"."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
