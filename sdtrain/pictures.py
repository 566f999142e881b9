"""Convert tensors to pictures: captioned grids, strips, PNG files that say how they were made."""

import json
import textwrap
import unicodedata
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor

from sdtrain.console import warn
from sdtrain.files import atomic_file
from sdtrain.fonts import font_file

TILE = 128
"""Pixels. Small pictures are enlarged to about this side, by an integer factor, unsmoothed."""

PAPER = (255, 255, 255)
INK = (30, 30, 30)

GAP = 8
"""Pixels between pictures."""

LINE = 15
"""Height of a line of text in pixels."""

LETTER = 6
"""Approximate width of a letter in pixels."""

NOTES = "sdtrain"
"""Name of the PNG text chunk that says how the picture was made."""


def to_uint8(images: Tensor) -> np.ndarray:
    """Convert [N, 3, H, W] in [-1, 1] to [N, H, W, 3] uint8."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def to_image(image: Tensor) -> Image.Image:
    """Convert [3, H, W] in [-1, 1] to a picture of the same size."""
    return Image.fromarray(to_uint8(image[None])[0])


def latents_as_rgb(latents: Tensor) -> Tensor:
    """Map latents [N, C, h, w] to [N, 3, h, w] in [-1, 1].

    Shows the first three channels, or one channel as grey, from -2 to 2 standard deviations.
    """
    shown = latents[:, :3] if latents.shape[1] >= 3 else latents[:, :1].expand(-1, 3, -1, -1)
    return (shown / 2).clamp(-1, 1)


def enlarge(pixels: np.ndarray) -> Image.Image:
    """Convert [H, W, 3] uint8 to a picture about TILE pixels wide."""
    small = Image.fromarray(pixels)
    factor = max(1, round(TILE / pixels.shape[1]))
    return small.resize((small.width * factor, small.height * factor), Image.Resampling.NEAREST)


def grid(images: Tensor, captions: list[str], columns: int = 4, title: str = "") -> Image.Image:
    """Draw images [N, 3, H, W] in [-1, 1] in rows of `columns`, each above its caption."""
    tiles = list(map(enlarge, to_uint8(images)))
    width, height = tiles[0].size
    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    blocks = [_wrap(caption, width, most=3) for caption in captions]
    row_height = height + LINE * max(map(len, blocks), default=0) + GAP
    top = 24 if title else GAP
    sheet, draw = _new_sheet(GAP + columns * (width + GAP), top + rows * row_height)
    _write(draw, (GAP, 5), title)
    for number, (tile, block) in enumerate(zip(tiles, blocks, strict=True)):
        row, column = divmod(number, columns)
        x = GAP + column * (width + GAP)
        y = top + row * row_height
        sheet.paste(tile, (x, y))
        for line_number, line in enumerate(block):
            _write(draw, (x, y + height + 2 + LINE * line_number), line)
    return sheet


def strip(rows: list[tuple[str, Tensor]], heads: list[str]) -> Image.Image:
    """Draw rows of pictures, each after its name, below common column heads.

    Args:
        rows: (name, images [N, 3, H, W] in [-1, 1]).
        heads: N strings.
    """
    left = 96
    top = 20
    tiles = []
    for _, images in rows:
        tiles.append(list(map(enlarge, to_uint8(images))))
    width, height = tiles[0][0].size
    sheet, draw = _new_sheet(left + len(heads) * (width + GAP), top + len(rows) * (height + GAP))
    for column, head in enumerate(heads):
        _write(draw, (left + column * (width + GAP), 4), head)
    for row, (name, _) in enumerate(rows):
        y = top + row * (height + GAP)
        _write(draw, (GAP, y + height // 2 - 8), textwrap.fill(name, 14))
        for column, tile in enumerate(tiles[row]):
            sheet.paste(tile, (left + column * (width + GAP), y))
    return sheet


def strip_of_rows(rows: list[tuple[str, list[Image.Image]]], heads: list[str]) -> Image.Image:
    """Draw rows of pictures, each after its name, below common column heads of several lines."""
    left = 150
    side = enlarge(np.asarray(rows[0][1][0])).width
    blocks = [_wrap(head, side, most=4) for head in heads]
    top = 8 + LINE * max(map(len, blocks))
    sheet, draw = _new_sheet(left + len(heads) * (side + GAP), top + len(rows) * (side + GAP))
    for column, block in enumerate(blocks):
        _write(draw, (left + column * (side + GAP), 4), "\n".join(block))
    for row, (name, pictures) in enumerate(rows):
        y = top + row * (side + GAP)
        _write(draw, (GAP, y + 8), "\n".join(textwrap.wrap(name, 22, break_long_words=True)))
        for column, picture in enumerate(pictures):
            pixels = np.asarray(picture.convert("RGB"))
            sheet.paste(enlarge(pixels), (left + column * (side + GAP), y))
    return sheet


def side_by_side(images: Tensor) -> Image.Image:
    """Put images [N, 3, H, W] in [-1, 1] in one row, at their own resolution."""
    return Image.fromarray(np.concatenate(list(to_uint8(images)), axis=1))


def _new_sheet(width: int, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    sheet = Image.new("RGB", (width, height), PAPER)
    return sheet, ImageDraw.Draw(sheet)


def _write(draw: ImageDraw.ImageDraw, position: tuple[int, int], text: str) -> None:
    font = ImageFont.load_default(size=12)
    if not text.isascii():  # Pillow's default font has only ASCII
        font = ImageFont.truetype(font_file(text), size=12)
    draw.multiline_text(position, text, fill=INK, font=font)


def _wrap(text: str, width: int, most: int) -> list[str]:
    """Wrap a text to at most `most` lines, each about `width` pixels wide."""
    is_wide = any(unicodedata.east_asian_width(letter) in "WF" for letter in text)
    letters = max(8, width // (2 * LETTER if is_wide else LETTER))
    return textwrap.wrap(text, width=letters, max_lines=most, placeholder=" ...")


def write_png(picture: Image.Image, path: Path, notes: dict[str, object] | None = None) -> None:
    """Write a PNG file whose text chunk NOTES holds `notes` as JSON. Raises OSError."""
    chunks = PngImagePlugin.PngInfo()
    if notes:
        chunks.add_itxt(NOTES, json.dumps(notes, ensure_ascii=False))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        picture.save(temporary, format="PNG", pnginfo=chunks)


def read_notes(picture: Image.Image) -> dict[str, object]:
    """Return the notes of `write_png`.

    Raises KeyError, ValueError or AttributeError if another program wrote the file.
    """
    return json.loads(picture.text[NOTES])


def write_png_or_warn(
    picture: Image.Image, path: Path, notes: dict[str, object] | None = None
) -> Path | None:
    """Write a PNG file during training. If that fails, print a warning and return None."""
    try:
        write_png(picture, path, notes)
    except OSError as error:
        warn(
            f"{path} cannot be written: {error.strerror}. Training continues without this picture."
        )
        return None
    return path
