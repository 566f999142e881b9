"""Decode a file to an upright RGB picture with 8 bits a channel, with Pillow alone."""

import contextlib
import io
import os
import struct
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, TiffImagePlugin

from sdtrain.errors import DataError

PIXEL_LIMIT = 2**26
"""67 million pixels, 8192 x 8192, which take 200 MB when decoded. The limit is needed because the
header of a file of a few kilobytes can claim any number."""

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
"""Formats that are recognised by a file's first bytes, whatever its suffix. Any other format of
Pillow is tried only for its own suffix, because some decoders accept arbitrary bytes.
"""

EXCLUDED_FORMATS = frozenset(
    {
        "BUFR",  # measurements, like the next two
        "GRIB",
        "HDF5",
        "EPS",  # would start Ghostscript
        "FITS",  # measurements of any range
        "IPTC",  # metadata of a picture
        "MPEG",  # a film
        "PSD",  # layers of a paint program, usually beside the finished picture
        "WMF",  # can be rendered on Windows only
    }
)
"""Formats that Pillow opens but that are not read, as they hold no finished picture."""

OTHER_SUFFIXES = {".mpo": "JPEG", ".pjpeg": "JPEG", ".pjp": "JPEG", ".jif": "JPEG"}
"""Further suffixes of formats that are read, which Pillow does not register."""

FLOAT_SUFFIX = ".pfm"
"""Floating point, whose values for black and white are not known: not read."""

WHITE = (255, 255, 255)
WITH_ALPHA = ("RGBA", "RGBa", "LA", "La", "PA")
SIDEWAYS = (5, 6, 7, 8)
"""EXIF orientations that exchange width and height."""

BROKEN_EXIF = (SyntaxError, ValueError, TypeError, LookupError, OSError, struct.error)
"""What Pillow raises for EXIF that it cannot parse."""


@dataclass(frozen=True)
class PictureFile:
    """An open file that holds a picture.

    location: how an error names it; it ends in the suffix of the file's name if it has one.
    """

    file: BinaryIO
    location: str


Source = str | Path | bytes | PictureFile | Image.Image


@dataclass(frozen=True)
class Header:
    """The header of a picture.

    size: (width, height) in pixels of the upright picture. has_frames: whether there are several
    frames or pages.
    """

    size: tuple[int, int]
    has_frames: bool


def picture_header(source: Source) -> Header:
    """Read the header only. Raises DataError as `open_picture` does, except for broken pixels."""
    with _open_checked(source) as picture:
        return Header(_upright_size(picture), _has_frames(picture))


@cache
def picture_suffixes() -> dict[str, str]:
    """Return {lower-case suffix: format} of the pictures that this build of Pillow can read."""
    formats = {}
    for suffix, name in (Image.registered_extensions() | OTHER_SUFFIXES).items():
        if name in Image.OPEN and name not in EXCLUDED_FORMATS:
            formats[suffix] = name
    formats.pop(FLOAT_SUFFIX, None)
    return formats


def open_picture(source: Source, *, background: Sequence[int] = WHITE) -> Image.Image:
    """Return the picture, upright, as RGB with 8 bits a channel; of an animation the first frame.

    Transparent pixels are composited onto `background`, (red, green, blue) in 0..255. 16-bit
    greyscale is scaled to 8 bits. Raises DataError, which names the path, if the file is missing,
    broken, neither of FORMATS nor of the format of its suffix, larger than PIXEL_LIMIT, or of a
    mode without a known range (floating point).
    """
    picture = _open_checked(source)
    try:
        with warnings.catch_warnings():
            # An icon contains pictures of other sizes than its header says.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture.load()
        orientation = _orientation(picture.getexif)
        rgb = _to_rgb(picture, tuple(background))
    # Decoders of Pillow raise OSError, SyntaxError, ValueError, struct.error, zlib.error and more.
    except Exception as error:
        raise _picture_error(
            source,
            f"cannot be decoded: {_reason(error)}",
            "Repair it, remove it, or set data.on_error=skip.",
        ) from error
    finally:
        if picture is not source:
            picture.close()
    return rgb if orientation == 1 else _turn_upright(rgb, orientation)


def _picture_error(source: Source, problem: str, remedy: str = "") -> DataError:
    """Return an error that names the picture; problem: the rest of the sentence."""
    path = _path_of(source)
    name = "in memory" if path is None else repr(path)
    return DataError(f"The picture {name} {problem}", key="data.path", remedy=remedy)


def _path_of(source: Source) -> str | None:
    """Return the path of a file, or what an open file is named by; None for one in memory."""
    if isinstance(source, PictureFile):
        return source.location
    return str(source) if isinstance(source, str | Path) else None


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _formats(source: str | Path | bytes | PictureFile) -> list[str]:
    """Return the formats to try: those of FORMATS that Pillow can open, and that of the suffix."""
    Image.init()  # fills Image.OPEN, the first time
    formats = [name for name in FORMATS if name in Image.OPEN]
    path = _path_of(source)
    if path is not None:
        own = picture_suffixes().get(os.path.splitext(path)[1].lower())
        if own is not None and own not in formats:
            formats.append(own)
    return formats


def _has_frames(picture: Image.Image) -> bool:
    if picture.format == "MPO":  # further frames are previews of the same photo
        return False
    # A broken second frame does not matter: only the first is read.
    with contextlib.suppress(Exception):
        return getattr(picture, "is_animated", False)
    return True


def _open_checked(source: Source) -> Image.Image:
    """Open a picture and check its header, without decoding pixels. Raises DataError."""
    picture = source if isinstance(source, Image.Image) else _identify(source)
    width, height = picture.size
    if width * height > PIXEL_LIMIT:
        raise _too_large(source, f"{width} x {height} = {width * height} pixels")
    if picture.mode == "F":
        raise _picture_error(
            source,
            "holds floating-point numbers, whose values for black and white are not known",
            "Save it with 8 or 16 bits a channel.",
        )
    return picture


def _identify(source: str | Path | bytes | PictureFile) -> Image.Image:
    """Let Pillow recognise the format and read the header, not the pixels. Raises DataError."""
    file = source
    if isinstance(source, bytes):
        file = io.BytesIO(source)
    elif isinstance(source, PictureFile):
        file = source.file
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return Image.open(file, formats=_formats(source))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise _too_large(source, str(error)) from error
    except Image.UnidentifiedImageError as error:
        known = ", ".join(_formats(source))
        problem = f"has no format that can be read; these are {known}"
        raise _picture_error(source, problem) from error
    except Exception as error:  # for the same reason as in open_picture
        raise _picture_error(source, f"cannot be opened: {_reason(error)}") from error


def _too_large(source: Source, seen: str) -> DataError:
    problem = f"is too large: {seen}; at most {PIXEL_LIMIT} pixels are read"
    return _picture_error(source, problem, "Make it smaller.")


def _orientation(read_exif: Callable[[], Image.Exif]) -> int:
    """Return the EXIF orientation (EXIF 2.32, tag 0x0112), or 1 if there is none."""
    # Broken EXIF is common in otherwise sound pictures: these are not rotated.
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return read_exif().get(ExifTags.Base.Orientation, 1)
    except BROKEN_EXIF:
        return 1


def _upright_size(picture: Image.Image) -> tuple[int, int]:
    """Return (width, height) after rotation, from the header alone.

    The orientation of a PNG whose EXIF follows its pixels is not seen: that needs all of the file.
    """
    width, height = picture.size
    if isinstance(picture, TiffImagePlugin.TiffImageFile):  # its size is upright already
        return width, height
    # Not the method of PngImageFile, which decodes the pixels to find EXIF behind them.
    orientation = _orientation(lambda: Image.Image.getexif(picture))
    return (height, width) if orientation in SIDEWAYS else (width, height)


def _turn_upright(rgb: Image.Image, orientation: int) -> Image.Image:
    # exif_transpose rewrites all EXIF fields, which fails if one of them is broken, so it is given
    # the orientation alone.
    rgb.info.clear()
    rgb.getexif()[ExifTags.Base.Orientation] = orientation
    return ImageOps.exif_transpose(rgb)


def _to_rgb(picture: Image.Image, background: tuple[int, ...]) -> Image.Image:
    """Return a new RGB picture. Raises ValueError if its values for black and white are unknown."""
    if picture.mode.startswith("I"):
        return _from_16_bits(picture, background)
    # "transparency" is a colour key, or a palette with alpha: convert("RGBA") applies it,
    # convert("RGB") shows what it hides.
    if "transparency" in picture.info or picture.mode in WITH_ALPHA:
        canvas = Image.new("RGBA", picture.size, (*background, 255))
        return Image.alpha_composite(canvas, picture.convert("RGBA")).convert("RGB")
    return picture.convert("RGB")


def _from_16_bits(picture: Image.Image, background: tuple[int, ...]) -> Image.Image:
    """Convert 16-bit greyscale (modes I;16 and I) to RGB.

    Pillow's convert("RGB") would clip the values at 255, which turns nearly everything white.
    """
    values = np.asarray(picture).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(
            f"its grey values range from {values.min()} to {values.max()}; 0 to 65535 are allowed"
        )
    grey = ((values + 128) // 257).astype(np.uint8)
    pixels = np.repeat(grey[:, :, None], 3, axis=2)
    if isinstance(picture.info.get("transparency"), int):
        pixels[values == picture.info["transparency"]] = background
    return Image.fromarray(pixels)
