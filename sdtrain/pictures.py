"""Tensors to pictures for people: captioned grids, strips, PNG files with their history."""

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
"""Pixels: small pictures are enlarged to about this side, by a whole factor without smoothing."""

PAPER = (255, 255, 255)
INK = (30, 30, 30)

GAP = 8
"""Pixels between pictures."""

LINE = 15
"""Pixels from one line of text to the next."""

LETTER = 6
"""Pixels that a letter takes in about."""

NOTES = "sdtrain"
"""The text chunk of a PNG file that says how it was made."""


def to_uint8(images: Tensor) -> np.ndarray:
    """[N, 3, H, W] in [-1, 1] to [N, H, W, 3] uint8."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def picture(image: Tensor) -> Image.Image:
    """[3, H, W] in [-1, 1] to a picture of its own size."""
    return Image.fromarray(to_uint8(image[None])[0])


def latents_as_colours(latents: Tensor) -> Tensor:
    """[N, C, h, w] latents to [N, 3, h, w] in [-1, 1]: the first three channels, or the only one.

    Two standard deviations to each side.
    """
    shown = latents[:, :3] if latents.shape[1] >= 3 else latents[:, :1].expand(-1, 3, -1, -1)
    return (shown / 2).clamp(-1, 1)


def tile(pixels: np.ndarray) -> Image.Image:
    """[H, W, 3] uint8 to a picture about TILE wide."""
    small = Image.fromarray(pixels)
    factor = max(1, round(TILE / pixels.shape[1]))
    return small.resize((small.width * factor, small.height * factor), Image.Resampling.NEAREST)


def grid(images: Tensor, captions: list[str], columns: int = 4, title: str = "") -> Image.Image:
    """images [N, 3, H, W] in [-1, 1], each with its caption below it, in rows of `columns`."""
    tiles = [tile(pixels) for pixels in to_uint8(images)]
    width, height = tiles[0].size
    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    blocks = [_wrapped(caption, width, most=3) for caption in captions]
    row_height = height + LINE * max((len(block) for block in blocks), default=0) + GAP
    top = 24 if title else GAP
    sheet, draw = _sheet(GAP + columns * (width + GAP), top + rows * row_height)
    _write(draw, (GAP, 5), title)
    for number, (picture, block) in enumerate(zip(tiles, blocks, strict=True)):
        row, column = divmod(number, columns)
        x = GAP + column * (width + GAP)
        y = top + row * row_height
        sheet.paste(picture, (x, y))
        for place, line in enumerate(block):
            _write(draw, (x, y + height + 2 + LINE * place), line)
    return sheet


def strip(rows: list[tuple[str, Tensor]], heads: list[str]) -> Image.Image:
    """Rows of pictures over common column heads.

    rows: (name, images [N, 3, H, W] in [-1, 1]). heads: N strings.
    """
    left = 96
    top = 20
    tiles = []
    for _, images in rows:
        tiles.append([tile(pixels) for pixels in to_uint8(images)])
    side = tiles[0][0].width
    sheet, draw = _sheet(left + len(heads) * (side + GAP), top + len(rows) * (side + GAP))
    for column, head in enumerate(heads):
        _write(draw, (left + column * (side + GAP), 4), head)
    for row, (name, _) in enumerate(rows):
        y = top + row * (side + GAP)
        _write(draw, (GAP, y + side // 2 - 8), textwrap.fill(name, 14))
        for column, picture in enumerate(tiles[row]):
            sheet.paste(picture, (left + column * (side + GAP), y))
    return sheet


def strip_of_rows(rows: list[tuple[str, list[Image.Image]]], heads: list[str]) -> Image.Image:
    """Rows of pictures, each after its name, under common heads of several lines."""
    left = 150
    side = tile(np.asarray(rows[0][1][0])).width
    blocks = [_wrapped(head, side, most=4) for head in heads]
    top = 8 + LINE * max(map(len, blocks))
    sheet, draw = _sheet(left + len(heads) * (side + GAP), top + len(rows) * (side + GAP))
    for column, block in enumerate(blocks):
        _write(draw, (left + column * (side + GAP), 4), "\n".join(block))
    for row, (name, pictures) in enumerate(rows):
        y = top + row * (side + GAP)
        _write(draw, (GAP, y + 8), "\n".join(textwrap.wrap(name, 22, break_long_words=True)))
        for column, picture in enumerate(pictures):
            pixels = np.asarray(picture.convert("RGB"))
            sheet.paste(tile(pixels), (left + column * (side + GAP), y))
    return sheet


def row(images: Tensor) -> Image.Image:
    """[N, 3, H, W] in [-1, 1] side by side, each in its own pixels."""
    return Image.fromarray(np.concatenate(list(to_uint8(images)), axis=1))


def _sheet(width: int, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    sheet = Image.new("RGB", (width, height), PAPER)
    return sheet, ImageDraw.Draw(sheet)


def _write(draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str) -> None:
    font = ImageFont.load_default(size=12)
    if not text.isascii():  # Pillow's own has no other letters
        font = ImageFont.truetype(font_file(text), size=12)
    draw.multiline_text(place, text, fill=INK, font=font)


def _wrapped(text: str, width: int, most: int) -> list[str]:
    """At most `most` lines that are about `width` pixels wide."""
    is_wide = any(unicodedata.east_asian_width(letter) in "WF" for letter in text)
    letters = max(8, width // (2 * LETTER if is_wide else LETTER))
    return textwrap.wrap(text, width=letters, max_lines=most, placeholder=" ...")


def write_png(picture: Image.Image, path: Path, notes: dict[str, object] | None = None) -> None:
    """Writes a PNG file whose text chunk NOTES holds `notes` as JSON. Raises OSError."""
    chunks = PngImagePlugin.PngInfo()
    if notes:
        chunks.add_itxt(NOTES, json.dumps(notes, ensure_ascii=False))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as beside:
        picture.save(beside, format="PNG", pnginfo=chunks)


def read_notes(picture: Image.Image) -> dict[str, object]:
    """What write_png has noted. Raises KeyError, ValueError or AttributeError of another's file."""
    return json.loads(picture.text[NOTES])


def write_if_room(
    picture: Image.Image, path: Path, notes: dict[str, object] | None = None
) -> Path | None:
    """The same while training: where the disk refuses it prints a line, and returns None."""
    try:
        write_png(picture, path, notes)
    except OSError as error:
        warn(f"{path} cannot be written: {error.strerror}. Training goes on without this picture.")
        return None
    return path
