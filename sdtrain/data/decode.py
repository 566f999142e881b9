"""From a file to an upright RGB picture with 8 bits a channel. Only Pillow sees the file."""

import contextlib
import io
import os
import struct
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from sdtrain.errors import DataError

# 67 million, 8192 x 8192: decoded, 200 MB. A file of a few kilobytes can claim any number.
PIXEL_LIMIT = 2**26

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
"""Those that a file is known by from its first bytes, whatever its suffix. Every other format of
Pillow's is tried only where the suffix is its own: some would take any bytes for a picture.
"""

NOT_READ = frozenset(
    {
        "BUFR",  # measurements, as the next two
        "GRIB",
        "HDF5",
        "EPS",  # would start Ghostscript
        "FITS",  # measurements of any range
        "IPTC",  # what is written about a picture
        "MPEG",  # a film
        "PSD",  # the layers of a paint program, beside whose file the finished picture lies
        "WMF",  # drawn on Windows alone
    }
)
"""What Pillow opens and is no finished picture."""

OTHER_SUFFIXES = {".mpo": "JPEG", ".pjpeg": "JPEG", ".pjp": "JPEG", ".jif": "JPEG"}
"""Of formats that are read, which Pillow does not name."""

NO_RANGE = ".pfm"
"""Floating point, whose black and white are not known."""
WHITE = (255, 255, 255)
WITH_ALPHA = ("RGBA", "RGBa", "LA", "La", "PA")

Source = str | Path | bytes | Image.Image


@dataclass(frozen=True)
class Header:
    """What a file says before its pixels: (width, height) in pixels as they are stored, and whether
    it holds several frames or pages.
    """

    size: tuple[int, int]
    has_frames: bool


def picture_header(source: Source) -> Header:
    """Raises DataError as `open_picture` does, but for what only the pixels show."""
    with _opened(source) as picture:
        return Header(picture.size, _has_frames(picture))


@cache
def picture_suffixes() -> dict[str, str]:
    """{suffix in small letters: format} of the pictures that this build of Pillow can read."""
    known = Image.registered_extensions() | OTHER_SUFFIXES
    read = {}
    for suffix, name in known.items():
        if name in Image.OPEN and name not in NOT_READ:
            read[suffix] = name
    read.pop(NO_RANGE, None)
    return read


def open_picture(source: Source, *, background: Sequence[int] = WHITE) -> Image.Image:
    """The picture, upright, as RGB with 8 bits a channel; of an animation the first frame.

    Transparent pixels are laid over `background`, (red, green, blue) in 0..255. 16-bit greyscale is
    scaled to 8 bits. Raises DataError, which names the path, when the file is missing, broken, of
    another format than FORMATS and its suffix's, larger than PIXEL_LIMIT, or of a mode without a
    known range (floating point).
    """
    picture = _opened(source)
    try:
        with warnings.catch_warnings():
            # An icon holds pictures of other sizes than its header says.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture.load()
        orientation = _orientation(picture)
        rgb = _rgb(picture, tuple(background))
    # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error and more.
    except Exception as error:
        raise _unreadable(
            source, f"cannot be decoded: {_reason(error)}", "Repair it or remove it."
        ) from error
    finally:
        if picture is not source:
            picture.close()
    return rgb if orientation == 1 else _turned_upright(rgb, orientation)


def _unreadable(source: Source, problem: str, remedy: str = "") -> DataError:
    """The error that names the picture."""
    name = repr(str(source)) if isinstance(source, str | Path) else "in memory"
    return DataError(f"The picture {name} {problem}", key="data.path", remedy=remedy)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _formats(source: str | Path | bytes) -> list[str]:
    """Those that a file may have: of FORMATS what this build of Pillow can open, and its
    suffix's.
    """
    suffixes = picture_suffixes()
    formats = [name for name in FORMATS if name in Image.OPEN]
    own = None
    if not isinstance(source, bytes):
        own = suffixes.get(os.path.splitext(source)[1].lower())
    return formats if own is None or own in formats else [*formats, own]


def _has_frames(picture: Image.Image) -> bool:
    if picture.format == "MPO":  # a photo, with previews of itself
        return False
    # A broken second frame does not matter: only the first is read.
    with contextlib.suppress(Exception):
        return getattr(picture, "is_animated", False)
    return True


def _opened(source: Source) -> Image.Image:
    """The picture before its pixels are decoded, its header checked. Raises DataError."""
    if isinstance(source, Image.Image):
        picture = source
    else:
        picture = _identified(source)
    width, height = picture.size
    if width * height > PIXEL_LIMIT:
        raise _too_large(source, f"{width} x {height} = {width * height} pixels")
    if picture.mode == "F":
        raise _unreadable(
            source,
            "holds floating-point numbers, whose black and white are not known",
            "Save it with 8 or 16 bits a channel.",
        )
    return picture


def _identified(source: str | Path | bytes) -> Image.Image:
    """The file, opened by Pillow, which reads its header and no pixel. Raises DataError."""
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return Image.open(file, formats=_formats(source))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise _too_large(source, str(error)) from error
    except Image.UnidentifiedImageError as error:
        known = ", ".join(_formats(source))
        problem = f"is of no format that can be read; those are {known}"
        raise _unreadable(source, problem) from error
    except Exception as error:  # as in open_picture
        raise _unreadable(source, f"cannot be opened: {_reason(error)}") from error


def _too_large(source: Source, seen: str) -> DataError:
    problem = f"is too large: {seen}; at most {PIXEL_LIMIT} pixels are read"
    return _unreadable(source, problem, "Make it smaller.")


def _orientation(picture: Image.Image) -> int:
    """The EXIF orientation (EXIF 2.32, tag 0x0112), 1 where there is none."""
    # Broken EXIF is common in pictures that are otherwise sound: they stay as they are stored.
    try:
        return picture.getexif().get(ExifTags.Base.Orientation, 1)
    except (SyntaxError, ValueError, TypeError, LookupError, OSError, struct.error):
        return 1


def _turned_upright(rgb: Image.Image, orientation: int) -> Image.Image:
    # Pillow writes the rest of EXIF anew, which fails where that is broken: it gets the orientation
    # and nothing else.
    rgb.info.clear()
    rgb.getexif()[ExifTags.Base.Orientation] = orientation
    return ImageOps.exif_transpose(rgb)


def _rgb(picture: Image.Image, background: tuple[int, ...]) -> Image.Image:
    """A new picture in RGB. Raises ValueError where black and white are not known."""
    if picture.mode.startswith("I"):
        return _from_16_bits(picture, background)
    # "transparency" is a colour key, or a palette with alpha: convert("RGBA") applies it,
    # convert("RGB") shows what it hides.
    if "transparency" in picture.info or picture.mode in WITH_ALPHA:
        over = Image.new("RGBA", picture.size, (*background, 255))
        return Image.alpha_composite(over, picture.convert("RGBA")).convert("RGB")
    return picture.convert("RGB")


def _from_16_bits(picture: Image.Image, background: tuple[int, ...]) -> Image.Image:
    """Greyscale of 16 bits (modes I;16 and I) as RGB.

    Pillow's own convert("RGB") clips it at 255, which turns nearly all white.
    """
    values = np.asarray(picture).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(
            f"its grey values go from {values.min()} to {values.max()}; 0 to 65535 are read"
        )
    grey = ((values + 128) // 257).astype(np.uint8)
    pixels = np.repeat(grey[:, :, None], 3, axis=2)
    if isinstance(picture.info.get("transparency"), int):
        pixels[values == picture.info["transparency"]] = background
    return Image.fromarray(pixels)
