"""Which files of a folder are pictures, and a line about those that are not.

Links to folders are followed. Nothing is left out without being counted.
"""

import os
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from sdtrain.data.decode import picture_suffixes
from sdtrain.errors import DataError

REFUSED = (".heic", ".heif", ".jxl")
"""Suffixes of pictures that Pillow cannot open: they are listed, and refused by name."""

CAPTION_SUFFIXES = (".txt", ".TXT")

LONGEST_SUFFIX = 12
"""What is longer is no suffix, but a name with a dot in it."""


@dataclass
class Listing:
    """What lies in a folder and below, by relative name with slashes.

    names: of the pictures, sorted. others: of the files that are none. hidden: of the files and
    folders that begin with a dot. dead_links, repeated: how many links lead nowhere, and to folders
    that are read under another name. roots: the real paths of the folder and of those that links
    lead to; what lies in none of them is not the data set's.
    """

    names: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    dead_links: int = 0
    repeated: int = 0
    roots: list[str] = field(default_factory=list)

    def holds(self, path: str) -> bool:
        """Whether a path, with its links resolved, lies in the folder or in one that is linked
        to.
        """
        real = os.path.realpath(path)
        return any(_lies_in(real, root) for root in self.roots)

    def left_out(self, read: Collection[str]) -> str:
        """What is not in `read`, counted by suffix; "" where that is nothing."""
        kinds = Counter(_kind(name) for name in self.others if name not in read)
        counted = [f"{count} {kind}" for kind, count in sorted(kinds.items())]
        hidden = [name for name in self.hidden if name not in read]
        for count, what in (
            (len(hidden), "hidden"),
            (self.dead_links, "links that lead nowhere"),
            (self.repeated, "links to folders that are read already, or that hold this one"),
        ):
            if count:
                counted.append(f"{count} {what}")
        return ", ".join(counted)


def list_folder(folder: str) -> Listing:
    """Walks a folder, and then the folders that links in it lead to.

    Each real folder is read once, under the name without a link where it has one: a link back up
    is no endless loop. DataError where a folder cannot be listed, or a picture has an odd name.
    """
    listing = Listing(roots=[os.path.realpath(folder)])
    seen = {listing.roots[0]}
    links = sorted(_walk(folder, "", listing, seen))
    while links:
        link = links.pop(0)
        real = os.path.realpath(os.path.join(folder, link))
        # A folder above the data would bring in what lies beside them.
        if real in seen or _lies_in(listing.roots[0], real):
            listing.repeated += 1
            continue
        seen.add(real)
        listing.roots.append(real)
        links += sorted(_walk(folder, link, listing, seen))
    listing.names.sort()
    _check_names(folder, listing.names)
    return listing


def suffix_of(name: str) -> str:
    """With its dot, in small letters; "" where there is none."""
    return os.path.splitext(name)[1].lower()


def _lies_in(path: str, folder: str) -> bool:
    return os.path.commonpath([path, folder]) == folder


def _kind(name: str) -> str:
    suffix = suffix_of(name)
    if suffix in CAPTION_SUFFIXES:
        return f"{suffix} that belong to no picture"
    is_word = suffix.isprintable() and 1 < len(suffix) <= LONGEST_SUFFIX
    return suffix if is_word else "without a suffix"


def _walk(folder: str, below: str, listing: Listing, seen: set[str]) -> Iterator[str]:
    """Takes in the files of `folder`/`below`, and yields the links to folders that it meets."""
    suffixes = {*picture_suffixes(), *REFUSED}

    def unreadable(error: OSError) -> None:
        raise DataError(
            f"data.path={folder}: {error.filename!r} cannot be listed: {error.strerror}",
            key="data.path",
            remedy="Change its permissions, or data.path.",
        ) from error

    for parent, folders, files in os.walk(os.path.join(folder, below), onerror=unreadable):
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
                listing.others.append(_relative(inside, name))


def _relative(inside: str, name: str) -> str:
    return name if inside == "." else "/".join((*inside.split(os.sep), name))


def _check_names(folder: str, names: Sequence[str]) -> None:
    """Raises DataError for bytes that are no UTF-8, and line breaks."""
    odd = [ascii(name) for name in names if not name.isprintable()]
    if odd:
        raise DataError(
            f"{len(odd)} file names in data.path={folder} are not printable text: {some(odd)}",
            key="data.path",
            remedy="Rename them, or change data.path.",
        )


def some(names: Sequence[str]) -> str:
    """Up to three names, and how many more."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
