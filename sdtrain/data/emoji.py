"""Real pictures without a download: the machine's colour emoji font, each emoji captioned with its Unicode name.

`python -m sdtrain.data.emoji FOLDER` writes them as a folder of PNGs with captions, which `Images` reads.
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

from sdtrain.data.decode import (
    WHITE,
    PictureSplit,
    Transform,
    check_options,
    make_splits,
    resize_short_side,
    rows_hash,
)
from sdtrain.errors import DataError, UserError

PLACES = (
    "/usr/share/fonts",
    "/usr/local/share/fonts",
    "~/.local/share/fonts",
    "~/.fonts",
    "/System/Library/Fonts/Apple Color Emoji.ttc",
    "/Library/Fonts",
    "~/Library/Fonts",
)
INSTALL = "Install one, on Debian and Ubuntu with apt-get install fonts-noto-color-emoji, or set data.font to the file of one."
# Bitmap fonts open in the sizes they hold only: Noto's 109, Apple's 160 and smaller. A scalable font opens in the first.
STRIKES = (109, 160, 136, 128, 96, 64)
INK = (255, 0, 254)  # what a glyph without colours of its own is drawn in; no emoji is plain in it
NONCHARACTER = chr(0x1FFFF)  # never assigned, so every font draws its .notdef for it
MARGIN = 4  # pixels of background around the largest glyph, on each side


def code_points() -> list[int]:
    """Code points that may be an emoji by themselves: symbols and punctuation with a name, beyond ASCII, below the tags' plane."""
    alone = [c for c in range(0x80, 0x20000) if unicodedata.category(chr(c))[0] in "SP"]
    modifiers = {
        *range(0x1F1E6, 0x1F200),
        *range(0x1F3FB, 0x1F400),
    }  # regional indicators; skin tones
    return [c for c in alone if c not in modifiers and unicodedata.name(chr(c), "")]


def find_fonts() -> list[str]:
    """Files that may be colour emoji fonts, likeliest first. Asks fontconfig where there is one, then looks in PLACES."""
    found = []
    if shutil.which("fc-list"):
        listed = subprocess.run(
            ["fc-list", "--format=%{file}\n", ":color=true"],
            capture_output=True,
            text=True,
            check=False,
        )
        found += listed.stdout.splitlines()
    for place in map(Path, map(os.path.expanduser, PLACES)):
        found += (
            [str(place)]
            if place.is_file()
            else [str(file) for file in place.rglob("*") if "emoji" in file.name.lower()]
        )
    fonts = {file for file in found if file.lower().endswith((".ttf", ".otf", ".ttc"))}
    return sorted(fonts, key=lambda file: (Path(file).name != "NotoColorEmoji.ttf", file))


def open_font(path: str) -> ImageFont.FreeTypeFont:
    """The font in the first of the sizes STRIKES that it has. DataError if it is none."""
    reason = ""
    for size in STRIKES:
        try:
            # Basic layout: one code point is one glyph, and Raqm refuses some of them.
            return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)
        except OSError as error:
            reason = str(error)
    raise DataError(f"data.font={path!r} cannot be opened as a font: {reason}. {INSTALL}")


def draw_emoji(path: str, background: Sequence[int]) -> dict[int, Image.Image]:
    """Code point -> RGB square, all of one side (136 pixels with Noto), the glyph in its middle. DataError if there are none."""
    font = open_font(path)
    side = int(max(font.getbbox(chr(0x1F600))[2:]) * 1.25)  # a glyph may leave its box a little
    seen = {_digest(_draw(font, NONCHARACTER, side, background))}
    glyphs = {}
    for c in code_points():
        canvas = _draw(font, chr(c), side, background)
        box = canvas.getchannel("A").getbbox()
        if box is None or not _has_colours(canvas):
            continue
        digest = _digest(canvas)
        if digest not in seen:
            seen.add(digest)
            glyphs[c] = canvas.crop(box).convert("RGB")
    if len(glyphs) < 2:
        raise DataError(
            f"data.font={path!r} has no colour glyphs that can be drawn; it must be a colour emoji font with bitmaps or COLR version 0 "
            f"(version 1 cannot be drawn). {INSTALL}"
        )
    square = max(max(glyph.size) for glyph in glyphs.values()) + 2 * MARGIN
    return {c: _centred(glyph, square, background) for c, glyph in glyphs.items()}


def _draw(
    font: ImageFont.FreeTypeFont, text: str, side: int, background: Sequence[int]
) -> Image.Image:
    # Drawn over the background with alpha 0: the colours come out blended with it, and alpha is where the glyph is.
    canvas = Image.new("RGBA", (side, side), (*background, 0))
    ImageDraw.Draw(canvas).text(
        (side // 10, side // 10), text, font=font, fill=INK, embedded_color=True
    )
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
    """name -> uint8 [3, S, S] with S at least image_size, out of one tensor [N, 3, s, s]."""

    def __init__(self, names: Sequence[str], pictures: Tensor, image_size: int) -> None:
        self._pictures, self._image_size = pictures, image_size
        self._row = {name: i for i, name in enumerate(names)}

    def __call__(self, name: str) -> Tensor:
        return resize_short_side(self._pictures[self._row[name]], self._image_size)


class Emoji:
    """The emoji of a colour font, about 1,300 in Noto, in squares of image_size; the caption is the Unicode name in lower case.

    font: a file; None looks for one. Which emoji have a name depends on Python's Unicode version (3.11: Unicode 14).
    Raises DataError where there is no such font and UserError for an option.
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
        self.image_size, self.background = image_size, tuple(background)
        self.font, drawn = _draw_first(font, background)
        self.code_points = list(drawn)
        # Larger than drawn, they are kept as drawn and enlarged when asked for: 512 x 512 would take a gigabyte.
        side = min(image_size, next(iter(drawn.values())).width)
        small = [
            F.pil_to_tensor(square.resize((side, side), Image.Resampling.LANCZOS))
            for square in drawn.values()
        ]
        names, captions = [file_name(c) for c in drawn], [caption_of(c) for c in drawn]
        # Which emoji a font has, and how large: another font, not another rendering of the same one.
        self.sha256 = rows_hash(
            (name, caption, square.width)
            for name, caption, square in zip(names, captions, drawn.values(), strict=True)
        )
        self._splits = make_splits(
            names=names,
            captions=captions,
            read=GlyphReader(names, torch.stack(small), image_size),
            fraction=validation_fraction,
            training=Transform(image_size=image_size, crop="center", flip=False, seed=seed),
            seed=seed,
        )

    def split(self, name: str) -> PictureSplit:
        """ "train" or "validation"."""
        return self._splits[name]

    def example_prompts(self, count: int) -> list[str]:
        """`count` training captions, spread evenly over the code points."""
        return self._splits["train"].spread(count)


def file_name(code_point: int) -> str:
    """As in 1f600.png. Five digits, so that the files sort as the code points do."""
    return f"{code_point:05x}.png"


def caption_of(code_point: int) -> str:
    """As in "grinning face"."""
    return unicodedata.name(chr(code_point)).lower()


def _draw_first(font: str | None, background: Sequence[int]) -> tuple[str, dict[int, Image.Image]]:
    if font is not None:
        path = os.path.expanduser(font)
        if not os.path.isfile(path):
            raise DataError(
                f"data.font={font!r} is not there; it must be the file of a colour emoji font. {INSTALL}"
            )
        return path, draw_emoji(path, background)
    tried = []
    for path in find_fonts():
        try:
            return path, draw_emoji(path, background)
        except DataError:
            tried.append(path)
    looked = (
        f"none of {', '.join(tried)} can be drawn"
        if tried
        else f"none is known to fc-list or lies in {', '.join(PLACES)}"
    )
    raise DataError(
        f"data.font is null and this machine has no colour emoji font that can be used: {looked}. {INSTALL}"
    )


def write_folder(data: Emoji, folder: Path, image_size: int | None = None) -> None:
    """Every emoji of both splits as a PNG, image_size square (None: as the font draws it), with its caption in a .txt beside it.

    UserError if the folder holds anything: pictures left there from before would be read with the new ones.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            f"The folder {str(folder)!r} is there and is not empty; the emoji need a new or empty one. Name another."
        )
    folder.mkdir(parents=True, exist_ok=True)
    for c, square in draw_emoji(data.font, data.background).items():
        if image_size is not None:
            square = square.resize((image_size, image_size), Image.Resampling.LANCZOS)
        square.save(folder / file_name(c))
        (folder / file_name(c)).with_suffix(".txt").write_text(
            caption_of(c) + "\n", encoding="utf-8"
        )


def main(words: Sequence[str] | None = None) -> int:
    """The command with its arguments, None: those of the process. Returns the exit code: 0, or that of the UserError."""
    parser = argparse.ArgumentParser(
        prog="python -m sdtrain.data.emoji",
        description="Write the emoji font as pictures with captions.",
    )
    parser.add_argument("folder", type=Path, help="where to write: a new or empty folder")
    parser.add_argument("--font", help="a colour emoji font's file; without it, one is looked for")
    parser.add_argument(
        "--image-size",
        type=int,
        help="pixels a side; without it, as the font draws them (136 with Noto)",
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
