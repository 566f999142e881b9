"""Tensors to pictures for people: captioned grids, strips, PNG files that say how they were made."""

import json
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor

from sdtrain.console import warn
from sdtrain.files import atomic_file

TILE = 128  # pixels: small pictures are enlarged to about this side, by a whole factor and without smoothing
PAPER, INK, GAP = (255, 255, 255), (30, 30, 30), 8


def to_uint8(images: Tensor) -> np.ndarray:
    """[N, 3, H, W] in [-1, 1] to [N, H, W, 3] uint8."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def picture(image: Tensor) -> Image.Image:
    """[3, H, W] in [-1, 1] to a picture of its own size."""
    return Image.fromarray(to_uint8(image[None])[0])


def latents_as_colours(latents: Tensor) -> Tensor:
    """[N, C, h, w] latents to [N, 3, h, w] in [-1, 1]: the first three channels, two standard deviations to each side."""
    shown = latents[:, :3] if latents.shape[1] >= 3 else latents[:, :1].expand(-1, 3, -1, -1)
    return (shown / 2).clamp(-1, 1)


def tile(pixels: np.ndarray) -> Image.Image:
    """[H, W, 3] uint8 to a picture about TILE wide."""
    picture, factor = Image.fromarray(pixels), max(1, round(TILE / pixels.shape[1]))
    return picture.resize(
        (picture.width * factor, picture.height * factor), Image.Resampling.NEAREST
    )


def grid(images: Tensor, captions: list[str], columns: int = 4, title: str = "") -> Image.Image:
    """images [N, 3, H, W] in [-1, 1], each with its caption below it, in rows of `columns`."""
    font = ImageFont.load_default(size=12)
    tiles = [tile(pixels) for pixels in to_uint8(images)]
    (side, height), columns = tiles[0].size, min(columns, len(tiles))
    lines = [
        textwrap.wrap(caption, width=max(8, side // 6), max_lines=3, placeholder=" ...")
        for caption in captions
    ]
    text_height, rows = (
        15 * max((len(block) for block in lines), default=0),
        -(-len(tiles) // columns),
    )
    top = 24 if title else GAP
    sheet = Image.new(
        "RGB", (GAP + columns * (side + GAP), top + rows * (height + text_height + GAP)), PAPER
    )
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, 5), title, fill=INK, font=font)
    for number, (picture, block) in enumerate(zip(tiles, lines, strict=True)):
        x, y = (
            GAP + number % columns * (side + GAP),
            top + number // columns * (height + text_height + GAP),
        )
        sheet.paste(picture, (x, y))
        for row, line in enumerate(block):
            draw.text((x, y + height + 2 + 15 * row), line, fill=INK, font=font)
    return sheet


def strip(rows: list[tuple[str, Tensor]], heads: list[str]) -> Image.Image:
    """Rows of pictures over common column heads. rows: (name, images [N, 3, H, W] in [-1, 1]); heads: N strings."""
    font, left = ImageFont.load_default(size=12), 96
    tiles = [[tile(pixels) for pixels in to_uint8(images)] for _, images in rows]
    side = tiles[0][0].width
    sheet = Image.new(
        "RGB", (left + len(heads) * (side + GAP), 20 + len(rows) * (side + GAP)), PAPER
    )
    draw = ImageDraw.Draw(sheet)
    for column, head in enumerate(heads):
        draw.text((left + column * (side + GAP), 4), head, fill=INK, font=font)
    for row, ((name, _), pictures) in enumerate(zip(rows, tiles, strict=True)):
        y = 20 + row * (side + GAP)
        draw.multiline_text((GAP, y + side // 2 - 8), textwrap.fill(name, 14), fill=INK, font=font)
        for column, picture in enumerate(pictures):
            sheet.paste(picture, (left + column * (side + GAP), y))
    return sheet


def strip_of_rows(rows: list[tuple[str, list[Image.Image]]], heads: list[str]) -> Image.Image:
    """Rows of pictures, each after its name, under common heads of several lines."""
    font, left, side = ImageFont.load_default(size=12), 150, tile(np.asarray(rows[0][1][0])).width
    wrapped = [
        textwrap.wrap(head, width=max(8, side // 6), max_lines=4, placeholder=" ...")
        for head in heads
    ]
    top = 8 + 15 * max(map(len, wrapped))
    sheet = Image.new(
        "RGB", (left + len(heads) * (side + GAP), top + len(rows) * (side + GAP)), PAPER
    )
    draw = ImageDraw.Draw(sheet)
    for column, lines in enumerate(wrapped):
        draw.multiline_text(
            (left + column * (side + GAP), 4), "\n".join(lines), fill=INK, font=font
        )
    for row, (name, pictures) in enumerate(rows):
        y = top + row * (side + GAP)
        draw.multiline_text(
            (GAP, y + 8),
            "\n".join(textwrap.wrap(name, 22, break_long_words=True)),
            fill=INK,
            font=font,
        )
        for column, picture in enumerate(pictures):
            sheet.paste(tile(np.asarray(picture.convert("RGB"))), (left + column * (side + GAP), y))
    return sheet


def row(images: Tensor) -> Image.Image:
    """[N, 3, H, W] in [-1, 1] side by side, each in its own pixels."""
    return Image.fromarray(np.concatenate(list(to_uint8(images)), axis=1))


def write_png(picture: Image.Image, path: Path, notes: dict[str, object] | None = None) -> None:
    """Writes a PNG whose text chunk "sdtrain" holds `notes` as JSON. Raises OSError."""
    chunks = PngImagePlugin.PngInfo()
    if notes:
        chunks.add_itxt("sdtrain", json.dumps(notes, ensure_ascii=False))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as beside:
        picture.save(beside, format="PNG", pnginfo=chunks)


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
