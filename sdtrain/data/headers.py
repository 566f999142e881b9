"""Read the headers of a data set's pictures: which can be used, and why the others cannot."""

import hashlib
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import BinaryIO, NamedTuple

from sdtrain.data.decode import PIXEL_LIMIT, PictureFile, picture_header
from sdtrain.data.listing import shortened
from sdtrain.data.reader import ChangedFileError, Source
from sdtrain.errors import DataError

CropOf = Callable[[tuple[int, int]], tuple[int, int]]
"""(width, height) of an upright picture -> (width, height) of its crop."""


@dataclass
class Unusable:
    """Why a picture cannot be used.

    reason: a whole sentence. scale: if the picture is merely smaller than its crop, the factor by
    which its sides would have to grow to cover it, above 1; else None. The other fields are set for
    such small pictures only. fingerprint: of the file. pixels_scaled_up: its number of pixels once
    scaled up to the crop. has_frames: whether it has several frames or pages. size: (width, height)
    of the upright picture.
    """

    reason: str
    scale: float | None = None
    fingerprint: str = ""
    pixels_scaled_up: float = 0
    has_frames: bool = False
    size: tuple[int, int] = (0, 0)


@dataclass
class Headers:
    """The pictures of a data set, classified by their headers.

    fingerprints: {name: `fingerprint_of` its file} of the usable pictures. sizes: {name: (width,
    height) of the upright picture} of the same ones. unusable: the others, by name. frames: names
    of usable pictures with several frames. scaled_up: names of usable pictures that are smaller
    than the crop.
    """

    fingerprints: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    unusable: dict[str, Unusable] = field(default_factory=dict)
    frames: list[str] = field(default_factory=list)
    scaled_up: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        """The number of pictures, usable or not."""
        return len(self.fingerprints) + len(self.unusable)

    @property
    def small_note(self) -> str:
        """A sentence about the pictures that are unusable only because they are small, or ""."""
        small = sum(picture.scale is not None for picture in self.unusable.values())
        if not small:
            return ""
        return f" {small} are merely smaller than the crop: data.upscale=true scales them up."

    def sort(self) -> None:
        """Sort everything by name."""
        self.fingerprints = dict(sorted(self.fingerprints.items()))
        self.unusable = dict(sorted(self.unusable.items()))
        self.frames.sort()

    def accept_small(self) -> None:
        """Mark pictures that are smaller than the crop as usable: they will be scaled up.

        Pictures so long and thin that they would exceed PIXEL_LIMIT when scaled up stay unusable.
        """
        for name, picture in list(self.unusable.items()):
            if picture.scale is None:
                continue
            if picture.pixels_scaled_up > PIXEL_LIMIT:
                reason = f"{picture.reason} Scaled up it would have more than {PIXEL_LIMIT} pixels."
                self.unusable[name] = Unusable(reason)
                continue
            del self.unusable[name]
            self.fingerprints[name] = picture.fingerprint
            self.sizes[name] = picture.size
            self.scaled_up.append(name)
            if picture.has_frames:
                self.frames.append(name)


class FileHeader(NamedTuple):
    """What is known of a picture once its header is read.

    size: (width, height) of the upright picture. has_frames: whether it has several frames or
    pages. fingerprint: see `fingerprint_of`.
    """

    size: tuple[int, int]
    has_frames: bool
    fingerprint: str


def read_header(source: Source, name: str) -> FileHeader:
    """Read the header of a picture. Raises DataError or OSError."""
    with source.open(name) as file:
        header = picture_header(PictureFile(file, source.location(name)))
        return FileHeader(header.size, header.has_frames, fingerprint_of(file))


def read_headers(
    source: Source,
    names: Iterable[str],
    crop_of: CropOf,
    *,
    upscale: bool,
    read: Callable[[str], FileHeader] | None = None,
) -> Headers:
    """Return what `classify_headers` does; upscale: whether small pictures are usable, too."""
    headers = classify_headers(source, names, crop_of, read)
    if upscale:
        headers.accept_small()
    return headers


def classify_headers(
    source: Source,
    names: Iterable[str],
    crop_of: CropOf,
    read: Callable[[str], FileHeader] | None = None,
) -> Headers:
    """Read the header of every picture and sort the pictures into usable and unusable ones.

    Args:
        source: the files.
        names: of the pictures, in the order in which they are read.
        crop_of: the crop of a picture, which is unusable if it does not cover that.
        read: takes a name, and returns the header as `read_header` does; None to read all files.
    """
    read = read or partial(read_header, source)
    headers = Headers()
    for name in names:
        location = source.location(name)
        try:
            header = read(name)
        except ChangedFileError:  # what else was read of the data set is of no use any more
            raise
        except DataError as error:
            headers.unusable[name] = Unusable(str(error))
        except OSError as error:  # the disk fails
            reason = f"The picture {location!r} cannot be read: {error.strerror}."
            headers.unusable[name] = Unusable(reason)
        else:
            width, height = header.size
            crop_width, crop_height = crop_of(header.size)
            scale = max(crop_width / width, crop_height / height)
            if scale > 1:
                reason = (
                    f"The picture {location!r} is smaller than its crop: {width} x {height} pixels "
                    f"do not cover {crop_width} x {crop_height}."
                )
                headers.unusable[name] = Unusable(
                    reason,
                    scale,
                    header.fingerprint,
                    pixels_scaled_up=scale**2 * width * height,
                    has_frames=header.has_frames,
                    size=header.size,
                )
            else:
                headers.fingerprints[name] = header.fingerprint
                headers.sizes[name] = header.size
                if header.has_frames:
                    headers.frames.append(name)
    headers.sort()
    return headers


def fingerprint_of(file: BinaryIO) -> str:
    """Return what distinguishes a file from another one in its place, without reading all of it.

    It is the number of bytes, and the sha256 of the first and last 4096 of them.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    ends = file.read(4096)
    file.seek(max(0, size - 4096))
    ends += file.read(4096)
    return f"{size} {hashlib.sha256(ends).hexdigest()}"


def check_usable(folder: str, headers: Headers, image_size: int) -> None:
    """Raise one DataError for all pictures that cannot be opened, or else for all too small."""
    unusable = headers.unusable
    broken = [name for name, picture in unusable.items() if picture.scale is None]
    if broken:
        raise DataError(
            f"{len(broken)} of {headers.count} pictures in data.path={folder} cannot be read: "
            f"{shortened(broken)}. Error of the first: {unusable[broken[0]].reason}",
            key="data.path",
            remedy="Repair or remove them, change data.path, or leave them out with "
            "data.on_error=skip.",
        )
    if unusable:
        smallest = max(unusable.values(), key=lambda picture: picture.scale)
        largest_size = math.floor(image_size / smallest.scale + 1e-6)  # of a quotient of integers
        raise DataError(
            f"{len(unusable)} of {headers.count} pictures in data.path={folder} are smaller than "
            f"their crop with data.image_size={image_size}: {shortened(list(unusable))}. The "
            f"smallest: {smallest.reason.rstrip('.')}",
            key="data.image_size",
            remedy=f"Set data.image_size to {largest_size} or less, scale them up with "
            "data.upscale=true, remove them, or leave them out with data.on_error=skip.",
        )


def check_counts(folder: str, headers: Headers, max_skipped: int) -> None:
    """Raise DataError if too many pictures are unusable, or fewer than two are usable."""
    unusable = headers.unusable
    if len(unusable) > max_skipped:
        last, picture = list(unusable.items())[-1]
        raise DataError(
            f"{len(unusable)} of {headers.count} pictures in data.path={folder} cannot be used, "
            f"but at most data.max_skipped={max_skipped} may be left out. "
            f"The last is {last}: {picture.reason}{headers.small_note}",
            key="data.max_skipped",
            remedy="Repair or remove them, or raise data.max_skipped.",
        )
    if len(headers.fingerprints) < 2:
        usable = ("no picture", "one picture")[len(headers.fingerprints)]
        without = f" and {len(unusable)} that cannot be used" if unusable else ""
        raise DataError(
            f"contains {usable}{without}; at least 2 are needed, one of them for validation",
            key="data.path",
            value=folder,
            remedy="Change data.path.",
        )
