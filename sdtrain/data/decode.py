"""From a file to an upright RGB picture with 8 bits a channel. Only Pillow sees the file."""

import io
import struct
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from sdtrain.errors import DataError

# 67 million, 8192 x 8192: decoded, 200 MB. A file of a few kilobytes can claim any number.
PIXEL_LIMIT = 2**26

# No EPS: it would start Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
WHITE = (255, 255, 255)
WITH_ALPHA = ("RGBA", "RGBa", "LA", "La", "PA")

Source = str | Path | bytes | Image.Image


def picture_size(source: Source) -> tuple[int, int]:
    """(width, height) in pixels as the file stores them, from its header alone.

    Raises DataError as `open_picture` does, but for what only the pixels show.
    """
    with _opened(source) as picture:
        return picture.size


def open_picture(source: Source, *, background: Sequence[int] = WHITE) -> Image.Image:
    """The picture, upright, as RGB with 8 bits a channel; of an animation the first frame.

    Transparent pixels are laid over `background`, (red, green, blue) in 0..255. 16-bit greyscale is
    scaled to 8 bits. Raises DataError, which names the path, when the file is missing, broken, of
    another format than FORMATS, larger than PIXEL_LIMIT, or of a mode without a known range
    (floating point).
    """
    picture = _opened(source)
    try:
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


@cache
def _formats() -> list[str]:
    """Those of FORMATS that this build of Pillow can open."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _opened(source: Source) -> Image.Image:
    """The picture before its pixels are decoded, its header checked. Raises DataError."""
    if isinstance(source, Image.Image):
        picture = source
    else:
        picture = _identified(source)
    width, height = picture.size
    if width * height > PIXEL_LIMIT:
        raise _too_large(source, f"{width} x {height} = {width * height} pixels")
    return picture


def _identified(source: str | Path | bytes) -> Image.Image:
    """The file, opened by Pillow, which reads its header and no pixel. Raises DataError."""
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return Image.open(file, formats=_formats())
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise _too_large(source, str(error)) from error
    except Image.UnidentifiedImageError as error:
        known = ", ".join(_formats())
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
    if picture.mode == "F":
        raise ValueError(
            "it holds floating-point numbers, whose black and white are not known; "
            "8 or 16 bits a channel are read"
        )
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
