"""Real pictures without a download: the emoji of an installed colour emoji font.

Each is captioned with its Unicode name. `python -m sdtrain.data.emoji FOLDER` writes them as a
folder of PNGs with captions, which `Images` can read.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from sdtrain.data.crop import Transform, resize_to_cover
from sdtrain.data.decode import WHITE
from sdtrain.data.split import PictureRow, PictureSplit, check_options, make_splits, rows_hash
from sdtrain.errors import DataError, UserError
from sdtrain.files import atomic_file, write_text

FONT_PLACES = (
    "/usr/share/fonts",
    "/usr/local/share/fonts",
    "~/.local/share/fonts",
    "~/.fonts",
    "/System/Library/Fonts/Apple Color Emoji.ttc",
    "/Library/Fonts",
    "~/Library/Fonts",
)
INSTALL = (
    "Install one, on Debian and Ubuntu with apt-get install fonts-noto-color-emoji, "
    "or set data.font to the file of one."
)
FONT_SIZES = (109, 160, 136, 128, 96, 64)
"""Sizes to try, in this order. A bitmap font opens only in the sizes it contains: Noto in 109,
Apple in 160 and smaller ones. A scalable font opens in the first."""

INK = (255, 0, 254)
"""Colour of glyphs that have none of their own; no emoji is entirely of this colour."""

NONCHARACTER = chr(0x1FFFF)
"""Never assigned, so every font draws its .notdef glyph for it."""

MARGIN = 4
"""Pixels of background on each side of the largest glyph."""

REGIONAL_INDICATORS = range(0x1F1E6, 0x1F200)
SKIN_TONES = range(0x1F3FB, 0x1F400)


def code_points() -> list[int]:
    """Return the code points that may be an emoji by themselves.

    These are symbols and punctuation with a name, beyond ASCII and below the plane of tags.
    """
    codes = []
    for code in range(0x80, 0x20000):
        is_symbol = unicodedata.category(chr(code))[0] in "SP"
        is_modifier = code in REGIONAL_INDICATORS or code in SKIN_TONES
        if is_symbol and not is_modifier and unicodedata.name(chr(code), ""):
            codes.append(code)
    return codes


def find_fonts() -> list[str]:
    """Return files that may be colour emoji fonts, the likeliest first.

    Asks fontconfig if it is installed, then searches FONT_PLACES.
    """
    found = []
    if shutil.which("fc-list"):
        listed = subprocess.run(
            ["fc-list", "--format=%{file}\n", ":color=true"],
            capture_output=True,
            text=True,
            check=False,
        )
        found += listed.stdout.splitlines()
    for name in FONT_PLACES:
        place = Path(os.path.expanduser(name))
        if place.is_file():
            found.append(str(place))
        else:
            found += [str(file) for file in place.rglob("*") if "emoji" in file.name.lower()]
    fonts = {file for file in found if file.lower().endswith((".ttf", ".otf", ".ttc"))}
    return sorted(fonts, key=lambda file: (Path(file).name != "NotoColorEmoji.ttf", file))


def open_font(path: str) -> ImageFont.FreeTypeFont:
    """Open the font in the first of FONT_SIZES that it has. Raises DataError if it has none."""
    reason = ""
    for size in FONT_SIZES:
        try:
            # Basic layout suffices for single code points, some of which Raqm rejects.
            return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)
        except OSError as error:
            reason = str(error)
    raise _font_error(path, f"cannot be opened as a font: {reason}")


def _font_error(path: str, problem: str) -> DataError:
    return DataError(problem, key="data.font", value=path, remedy=INSTALL)


def draw_emoji(path: str, background: Sequence[int]) -> dict[int, Image.Image]:
    """Return {code point: RGB square with the glyph in its middle}.

    All squares have the same side (136 pixels with Noto). Raises DataError if the font has fewer
    than two colour glyphs that can be drawn.
    """
    font = open_font(path)
    canvas_side = int(
        max(font.getbbox(chr(0x1F600))[2:]) * 1.25
    )  # a glyph may exceed its box a little
    seen = {_digest(_draw(font, NONCHARACTER, canvas_side, background))}
    glyphs = {}
    for code in code_points():
        canvas = _draw(font, chr(code), canvas_side, background)
        box = canvas.getchannel("A").getbbox()
        if box is None or not _has_colours(canvas):
            continue
        digest = _digest(canvas)
        if digest not in seen:
            seen.add(digest)
            glyphs[code] = canvas.crop(box).convert("RGB")
    if len(glyphs) < 2:
        raise _font_error(
            path,
            "has no colour glyphs that can be drawn; it must be a colour emoji font with bitmaps "
            "or COLR version 0 (version 1 cannot be drawn)",
        )
    largest = max(max(glyph.size) for glyph in glyphs.values())
    squares = {}
    for code, glyph in glyphs.items():
        squares[code] = _centred(glyph, largest + 2 * MARGIN, background)
    return squares


def _draw(
    font: ImageFont.FreeTypeFont, text: str, side: int, background: Sequence[int]
) -> Image.Image:
    # On a background with alpha 0 the colours are blended with the background, and alpha shows
    # where the glyph is.
    canvas = Image.new("RGBA", (side, side), (*background, 0))
    place = (side // 10, side // 10)
    ImageDraw.Draw(canvas).text(place, text, font=font, fill=INK, embedded_color=True)
    return canvas


def _digest(canvas: Image.Image) -> bytes:
    return hashlib.blake2b(canvas.tobytes(), digest_size=16).digest()


def _has_colours(canvas: Image.Image) -> bool:
    pixels = np.asarray(canvas)
    solid = pixels[pixels[..., 3] == 255][:, :3]
    return bool((solid != INK).any())


def _centred(glyph: Image.Image, side: int, background: Sequence[int]) -> Image.Image:
    square = Image.new("RGB", (side, side), tuple(background))
    square.paste(glyph, ((side - glyph.width) // 2, (side - glyph.height) // 2))
    return square


class GlyphReader:
    """Returns the glyph of a name, resized to uint8 [3, image_size, image_size].

    Args:
        names: N file names.
        pictures: the glyphs in the same order, uint8 [N, 3, s, s].
        image_size: in pixels.
    """

    def __init__(self, names: Sequence[str], pictures: Tensor, image_size: int) -> None:
        self._pictures = pictures
        self._image_size = image_size
        self._row = {name: i for i, name in enumerate(names)}

    def __call__(self, name: str, size: tuple[int, int] | None = None) -> Tensor:
        picture = self._pictures[self._row[name]]
        return resize_to_cover(picture, size or (self._image_size, self._image_size))

    def read_bytes(self, name: str) -> bytes:
        """Return the pixels of the glyph: there is no file of it."""
        return self._pictures[self._row[name]].numpy().tobytes()


class Emoji:
    """The emoji of a colour font, about 1,300 in Noto, captioned with their Unicode names.

    Which emoji have a name depends on Python's Unicode version (3.11: Unicode 14). Raises DataError
    if there is no such font, UserError for an argument that is not allowed.

    Args:
        font: a font file; None searches for one.
        image_size: side of the squares in pixels.
        validation_fraction: share of the pictures that is held out.
        background: (red, green, blue) in 0..255 around the glyphs.
        seed: of the hold-out.
    """

    num_classes = 1

    def __init__(
        self,
        *,
        font: str | None = None,
        image_size: int = 32,
        validation_fraction: float = 0.05,
        background: Sequence[int] = WHITE,
        seed: int = 0,
    ) -> None:
        check_options(
            image_size=image_size, validation_fraction=validation_fraction, background=background
        )
        self.image_size = image_size
        self.background = tuple(background)
        self.font, squares = _draw_first(font, background)
        self.code_points = list(squares)
        # Pictures larger than the font draws them are enlarged only on access: all of them in
        # 512 x 512 would take a gigabyte.
        side = min(image_size, next(iter(squares.values())).width)
        rows = []
        # The hash covers which emoji a font has, and how large: it changes with the font, but not
        # with another rendering of the same one.
        hashed = []
        pictures = []
        for code, square in squares.items():
            row = PictureRow(file_name(code), [caption_of(code)], square.size)
            rows.append(row)
            hashed.append((row.name, caption_of(code), square.width))
            resized = square.resize((side, side), Image.Resampling.LANCZOS)
            pictures.append(F.pil_to_tensor(resized))
        self.sha256 = rows_hash(hashed)
        names = [row.name for row in rows]
        self._splits = make_splits(
            rows=rows,
            reader=GlyphReader(names, torch.stack(pictures), image_size),
            fraction=validation_fraction,
            training=Transform(image_size=image_size, crop="center", flip=False, seed=seed),
            seed=seed,
        )

    def split(self, name: str) -> PictureSplit:
        """Return the split "train" or "validation"."""
        return self._splits[name]

    def example_prompts(self, count: int) -> list[str]:
        """Return `count` training captions, spread evenly over the code points."""
        return self._splits["train"].spread_captions(count)


def file_name(code_point: int) -> str:
    """Return a name as in 1f600.png. Five digits make the files sort like the code points."""
    return f"{code_point:05x}.png"


def caption_of(code_point: int) -> str:
    """Return the lower-case Unicode name, as in "grinning face"."""
    return unicodedata.name(chr(code_point)).lower()


def _draw_first(font: str | None, background: Sequence[int]) -> tuple[str, dict[int, Image.Image]]:
    """Return (font file, its `draw_emoji`) of the first usable font. DataError if there is none."""
    if font is not None:
        path = os.path.expanduser(font)
        if not os.path.isfile(path):
            raise _font_error(font, "does not exist; it must be the file of a colour emoji font")
        return path, draw_emoji(path, background)
    tried = []
    for path in find_fonts():
        try:
            return path, draw_emoji(path, background)
        except DataError:
            tried.append(path)
    reason = f"fc-list knows none and none lies in {', '.join(FONT_PLACES)}"
    if tried:
        reason = f"none of {', '.join(tried)} can be drawn"
    raise DataError(
        "data.font is null and this machine has no colour emoji font that can be used: " + reason,
        key="data.font",
        remedy=INSTALL,
    )


def write_folder(data: Emoji, folder: Path, image_size: int | None = None) -> None:
    """Write every emoji of both splits as a PNG, with its caption in a .txt file beside it.

    image_size: side of the squares in pixels; None keeps the font's. Raises UserError if the folder
    is not empty, because its pictures would later be read together with the new ones.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            f"The folder {str(folder)!r} exists and is not empty; "
            "the emoji need a new or empty one",
            key="FOLDER",
            remedy="Name another.",
        )
    folder.mkdir(parents=True, exist_ok=True)
    for code, square in draw_emoji(data.font, data.background).items():
        if image_size is not None:
            square = square.resize((image_size, image_size), Image.Resampling.LANCZOS)
        file = folder / file_name(code)
        with atomic_file(file) as beside:
            square.save(beside, "PNG")
        write_text(file.with_suffix(".txt"), caption_of(code) + "\n")


def main(words: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0, or that of the UserError.

    words: the command-line arguments; None takes those of the process.
    """
    parser = argparse.ArgumentParser(
        prog="python -m sdtrain.data.emoji",
        description="Write the emoji of a colour emoji font as pictures with captions.",
    )
    parser.add_argument("folder", type=Path, help="where to write: a new or empty folder")
    parser.add_argument(
        "--font", help="file of a colour emoji font; without it, an installed one is used"
    )
    parser.add_argument(
        "--image-size",
        type=int,
        help="side of the pictures in pixels; without it, that of the font (136 with Noto)",
    )
    arguments = parser.parse_args(words)
    try:
        data = Emoji(font=arguments.font)
        write_folder(data, arguments.folder, arguments.image_size)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"{len(data.code_points)} pictures with captions written to {arguments.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
