"""From a picture file to a row: header judged, decoded to RGB by mode, resized, cropped and flipped by keyed draws, held out or not.

What every set of real pictures shares. Only Pillow sees the file; torchvision works on tensors.
"""

import hashlib
import io
import json
import struct
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import count
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from sdtrain.errors import DataError, UserError
from sdtrain.randomness import KeyedRandom
from sdtrain.types import Row

PIXEL_LIMIT = (
    2**26
)  # 67 million, 8192 x 8192: decoded, 200 MB. A file of a few kilobytes can claim any number.
FORMATS = (
    "PNG",
    "JPEG",
    "WEBP",
    "BMP",
    "GIF",
    "TIFF",
    "PPM",
    "JPEG2000",
    "AVIF",
)  # no EPS: it would start Ghostscript
WHITE = (255, 255, 255)

# EXIF orientation -> what undoes it (EXIF 2.32, tag 0x0112).
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

Source = str | Path | bytes | Image.Image


def picture_size(source: Source) -> tuple[int, int]:
    """(width, height) in pixels as the file stores them, from its header alone. DataError as in `open_picture`."""
    with _opened(source) as picture:
        return picture.size


def open_picture(source: Source, *, background: Sequence[int] = WHITE) -> Image.Image:
    """The picture, upright, as RGB with 8 bits a channel; of an animation the first frame.

    Transparent pixels are laid over `background`, (red, green, blue) in 0..255. 16-bit greyscale is scaled to 8 bits.
    Raises DataError, which names the path, when the file is missing, broken, of another format than FORMATS, larger than
    PIXEL_LIMIT, or of a mode without a known range (floating point).
    """
    picture = _opened(source)
    try:
        picture.load()
        orientation = _orientation(picture)
        rgb = _rgb(picture, tuple(background))
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error and more
        raise DataError(
            f"The picture {_name(source)} cannot be decoded: {_reason(error)}. Repair it or remove it."
        ) from error
    finally:
        if picture is not source:
            picture.close()
    return rgb.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else rgb


def _name(source: Source) -> str:
    return repr(str(source)) if isinstance(source, str | Path) else "in memory"


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@cache
def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _opened(source: Source) -> Image.Image:
    """The picture before its pixels are decoded, header judged."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if isinstance(source, Image.Image):
                picture = source
            else:
                picture = Image.open(
                    io.BytesIO(source) if isinstance(source, bytes) else source, formats=_formats()
                )
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise DataError(
            f"The picture {_name(source)} is too large: {error}; at most {PIXEL_LIMIT} pixels are read. Make it smaller."
        ) from error
    except Image.UnidentifiedImageError as error:
        raise DataError(
            f"The picture {_name(source)} is of no format that can be read; those are {', '.join(_formats())}."
        ) from error
    except Exception as error:  # as in open_picture
        raise DataError(
            f"The picture {_name(source)} cannot be opened: {_reason(error)}."
        ) from error
    width, height = picture.size
    if width * height > PIXEL_LIMIT:
        raise DataError(
            f"The picture {_name(source)} is too large: {width} x {height} = {width * height} pixels; "
            f"at most {PIXEL_LIMIT} are read. Make it smaller."
        )
    return picture


def _orientation(picture: Image.Image) -> int:
    # Broken EXIF is common in pictures that are otherwise sound: they stay as they are stored.
    try:
        return picture.getexif().get(0x0112, 1)
    except (SyntaxError, ValueError, TypeError, LookupError, OSError, struct.error):
        return 1


def _rgb(picture: Image.Image, background: tuple[int, ...]) -> Image.Image:
    if picture.mode == "F":
        raise ValueError(
            "it holds floating-point numbers, whose black and white are not known; 8 or 16 bits a channel are read"
        )
    if picture.mode.startswith("I"):
        return _from_16_bits(picture, background)
    # "transparency" is a colour key, or a palette with alpha: convert("RGBA") applies it, convert("RGB") shows what it hides.
    if "transparency" in picture.info or picture.mode in ("RGBA", "RGBa", "LA", "La", "PA"):
        over = Image.new("RGBA", picture.size, (*background, 255))
        return Image.alpha_composite(over, picture.convert("RGBA")).convert("RGB")
    return picture.convert("RGB")


def _from_16_bits(picture: Image.Image, background: tuple[int, ...]) -> Image.Image:
    """Greyscale of 16 bits (modes I;16 and I): Pillow's own convert("RGB") clips it at 255, which turns nearly all white."""
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


def resize_short_side(picture: Image.Image | Tensor, image_size: int) -> Tensor:
    """uint8 [3, h, w] with min(h, w) = image_size, of an RGB picture or a uint8 tensor [3, H, W]. Antialiased."""
    pixels = F.pil_to_tensor(picture) if isinstance(picture, Image.Image) else picture
    return F.resize(
        pixels, [image_size], interpolation=v2.InterpolationMode.BICUBIC, antialias=True
    )


class Transform:
    """Crop to a square, flip, and scale to [-1, 1]: a pure function of (picture, seed, ordinal).

    The draws are KeyedRandom(seed, "transform").uniform(ordinal, 3): crop_y, crop_x, flip. "center" ignores the first two,
    flip=False the third, so no setting shifts the draws of another.
    """

    def __init__(
        self, *, image_size: int, crop: Literal["random", "center"], flip: bool, seed: int
    ) -> None:
        if crop not in ("random", "center"):
            raise UserError(f"data.crop={crop!r} is none of random, center. Change data.crop.")
        self.image_size, self.crop, self.flip = image_size, crop, flip
        self._random = KeyedRandom(seed, "transform")
        self._to_range = v2.Compose(
            [v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)]
        )

    def __call__(self, picture: Tensor, ordinal: int) -> Tensor:
        """picture: uint8 [3, h, w], h and w at least image_size. Returns float32 [3, image_size, image_size] in [-1, 1]."""
        size = self.image_size
        room_y, room_x = picture.shape[1] - size, picture.shape[2] - size
        crop_y, crop_x, flip = (
            self._random.uniform(ordinal, 3)
            if self.crop == "random" or self.flip
            else (0.0, 0.0, 1.0)
        )
        if self.crop == "random":
            top, left = int(crop_y * (room_y + 1)), int(crop_x * (room_x + 1))
        else:
            top, left = room_y // 2, room_x // 2
        picture = F.crop(
            picture, top, left, size, size
        ).contiguous()  # Pillow's bytes lie channels last
        if self.flip and flip < 0.5:
            picture = F.horizontal_flip(picture)
        return self._to_range(picture)


def hold_out_count(pictures: int, fraction: float) -> int:
    """How many of `pictures` (at least 2) are held out: `fraction` of them, at least 64, at most a quarter, never none."""
    return max(1, min(max(round(pictures * fraction), 64), pictures // 4))


def hold_out(names: Sequence[str], fraction: float, seed: int) -> set[str]:
    """The names held out for validation: the lowest by a hash keyed by `seed`, so that a new picture moves few others."""

    def rank(name: str) -> bytes:
        return hashlib.blake2b(f"{seed}/hold_out/{name}".encode(), digest_size=16).digest()

    distinct = sorted(set(names), key=rank)
    return set(distinct[: hold_out_count(len(distinct), fraction)])


def rows_hash(rows: Iterable[tuple[str, str, str | int]]) -> str:
    """sha256 over (name, caption, what tells the picture from another of its name) of every row, in their order."""
    return hashlib.sha256(json.dumps(list(rows)).encode()).hexdigest()


def too_many(last: str, max_skipped: int) -> DataError:
    """What ends a run that has met more than `max_skipped` broken pictures, `last` is what is wrong with the last of them."""
    return DataError(
        f"More pictures turned out broken while training than may still be left out ({max_skipped}), or all of a split. The last: {last} "
        f"Look at the disk and the pictures, or raise data.max_skipped."
    )


def check_options(
    *, image_size: int, validation_fraction: float, background: Sequence[int]
) -> None:
    """UserError for a value that no picture data can have."""
    if image_size < 1:
        raise UserError(
            f"data.image_size={image_size} is no size in pixels: it must be at least 1. Change data.image_size."
        )
    if not 0 < validation_fraction <= 0.25:
        raise UserError(
            f"data.validation_fraction={validation_fraction} must be above 0 and at most 0.25, which is the most that is "
            f"held out. Change data.validation_fraction."
        )
    if len(background) != 3 or not all(0 <= value <= 255 for value in background):
        raise UserError(
            f"data.background={list(background)} must be red, green, blue, each from 0 to 255. Change data.background."
        )


class PictureSplit:
    """One split: rows of names and captions, `read` that gives a name's pixels, and the transform. Fulfils `types.Pictures`.

    Where a picture cannot be read, DataError; unless up to `max_skipped` may be replaced: then the row is another of the split, a pure function of
    (seed, ordinal, attempt), so that batches stay full and equal with any number of workers and ranks, and after a resume.
    """

    def __init__(
        self,
        *,
        names: list[str],
        captions: list[str],
        read: Callable[[str], Tensor],
        transform: Transform,
        seed: int,
        max_skipped: int | None,
    ) -> None:
        from datasets import Dataset  # here, because it takes a second that other data do not need

        self._rows, self._different = (
            Dataset.from_dict({"file_name": names, "text": captions}),
            len(set(names)),
        )
        self._read, self._transform, self._max_skipped, self._other = (
            read,
            transform,
            max_skipped,
            KeyedRandom(seed, "replacement"),
        )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, item: tuple[int, int]) -> Row:
        (index, ordinal), skipped = map(int, item), {}
        for attempt in count():
            row = self._rows[index]
            try:
                image = self._transform(self._read(row["file_name"]), ordinal)
            except DataError as error:
                if self._max_skipped is None:
                    raise
                skipped[row["file_name"]] = str(error)
                if len(skipped) > self._max_skipped or len(skipped) == self._different:
                    raise too_many(str(error), self._max_skipped) from error
                index = int(self._other.uniform(ordinal, 1, attempt)[0] * len(self))
            else:
                return Row(image=image, caption=row["text"], skipped=tuple(skipped.items()))

    @property
    def names(self) -> list[str]:
        """Relative file names, in the order of the indices."""
        return self._rows["file_name"][:]

    @property
    def captions(self) -> list[str]:
        """All captions, in the order of the indices."""
        return self._rows["text"][:]

    def spread(self, count: int) -> list[str]:
        """`count` captions spread evenly over the split; the empty ones are passed over where there are others."""
        captions = [caption for caption in self.captions if caption] or self.captions
        return [captions[i * len(captions) // count] for i in range(count)]


def make_splits(
    *,
    names: list[str],
    captions: list[str],
    read: Callable[[str], Tensor],
    fraction: float,
    training: Transform,
    seed: int,
    max_skipped: int | None = None,
) -> dict[str, PictureSplit]:
    """The splits "train", with `training` as its transform, and "validation": centre crop, no flip. A name is in one of them only."""
    held_out = hold_out(names, fraction, seed)
    centred = Transform(image_size=training.image_size, crop="center", flip=False, seed=seed)
    splits = {}
    for split, transform in (("train", training), ("validation", centred)):
        rows = [
            (n, c)
            for n, c in zip(names, captions, strict=True)
            if (n in held_out) == (split == "validation")
        ]
        kept = {"names": [n for n, _ in rows], "captions": [c for _, c in rows]}
        splits[split] = PictureSplit(
            **kept, read=read, transform=transform, seed=seed, max_skipped=max_skipped
        )
    return splits
