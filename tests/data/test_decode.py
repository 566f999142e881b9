"""Pictures of every mode come out upright and in known colours."""

import io
import struct
import subprocess
import sys
import warnings

import numpy as np
import pytest
from PIL import Image

from sdtrain.data import decode
from sdtrain.data.decode import open_picture, picture_header
from sdtrain.errors import DataError

RED = (255, 0, 0)
GREEN = (0, 255, 0)


def encoded(picture, format="PNG", **options):
    stream = io.BytesIO()
    picture.save(stream, format, **options)
    return stream.getvalue()


def corner(data, **options):
    """The top left pixel."""
    picture = open_picture(data, **options)
    assert picture.mode == "RGB"
    return picture.getpixel((0, 0))


def test_the_first_picture_of_a_process_needs_no_suffix():
    """Pillow registers its formats when the first file is opened."""
    picture = encoded(Image.new("RGB", (6, 4)), "JPEG")
    code = f"from sdtrain.data.decode import picture_header; print(picture_header({picture}).size)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.stdout == "(6, 4)\n", ended.stderr


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
@pytest.mark.parametrize(
    ("value", "grey"),
    [(0, 0), (128, 0), (129, 1), (300, 1), (0x8080, 128), (65406, 254), (65535, 255)],
)
def test_16_bit_greyscale_keeps_its_shades(format, value, grey):
    picture = Image.fromarray(np.full((4, 6), value, np.uint16))
    assert picture.mode == "I;16"
    assert corner(encoded(picture, format)) == (grey, grey, grey)


def test_16_bit_colour_key_shows_the_background():
    values = np.array([[7, 65535]], np.uint16)
    picture = open_picture(encoded(Image.fromarray(values), transparency=7), background=GREEN)
    assert [picture.getpixel((x, 0)) for x in (0, 1)] == [GREEN, (255, 255, 255)]


def test_palette_with_and_without_a_transparent_entry():
    picture = Image.new("P", (4, 4), 1)
    picture.putpalette([10, 20, 30, *RED])
    assert corner(encoded(picture)) == RED
    assert corner(encoded(picture, transparency=1), background=GREEN) == GREEN
    assert corner(encoded(picture, "GIF", transparency=1), background=GREEN) == GREEN


def test_cmyk():
    # No ink is white, all of yellow and magenta is red; JPEG is lossy by a little.
    for ink, colour in [
        ((0, 0, 0, 0), (255, 255, 255)),
        ((0, 255, 255, 0), RED),
        ((0, 0, 0, 255), (0, 0, 0)),
    ]:
        seen = corner(encoded(Image.new("CMYK", (16, 16), ink), "JPEG", quality=95))
        assert np.abs(np.subtract(seen, colour)).max() <= 3


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_laid_over_the_background(mode):
    hidden = (*RED, 0) if mode == "RGBA" else (90, 0)
    assert corner(encoded(Image.new(mode, (4, 4), hidden))) == (255, 255, 255)
    assert corner(encoded(Image.new(mode, (4, 4), hidden)), background=[1, 2, 3]) == (1, 2, 3)


def test_half_alpha():
    assert corner(encoded(Image.new("RGBA", (4, 4), (*RED, 51))), background=GREEN) == (
        51,
        204,
        0,
    )  # 51 / 255 = 0.2


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize(
    ("orientation", "stored"),
    [
        (1, lambda a: a),
        (2, np.fliplr),
        (3, lambda a: np.rot90(a, 2)),
        (4, np.flipud),
        (5, lambda a: a.swapaxes(0, 1)),
        (6, lambda a: np.rot90(a, 1)),
        (7, lambda a: np.rot90(a, 2).swapaxes(0, 1)),
        (8, lambda a: np.rot90(a, -1)),
    ],
)
def test_exif_rotation_is_undone(format, orientation, stored):
    upright = (
        np.random.default_rng(0)
        .integers(0, 256, (3, 5, 3), dtype=np.uint8)
        .repeat(16, 0)
        .repeat(16, 1)
    )
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(Image.fromarray(np.ascontiguousarray(stored(upright))), format, exif=exif)
    seen = np.asarray(open_picture(content))
    assert seen.shape == upright.shape
    assert picture_header(content).size == upright.shape[1::-1]
    assert np.abs(seen.astype(int) - upright).mean() < (20 if format == "JPEG" else 1e-9)


def with_broken_exif(orientation):
    """A JPEG of 6 x 4 whose EXIF holds the orientation, and an entry that points beyond its end."""
    entries = [
        struct.pack("<HHII", 0x010F, 2, 4000, 60000),
        struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0),
    ]
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    exif = b"Exif\0\0II*\0" + struct.pack("<I", 8) + directory
    return encoded(Image.new("RGB", (6, 4), RED), "JPEG", exif=exif)


def test_broken_exif_takes_nothing_of_a_sound_picture():
    # The orientation is obeyed where it can be read, else the picture stays as it is stored.
    assert open_picture(with_broken_exif(6)).size == (4, 6)
    assert picture_header(with_broken_exif(6)).size == (4, 6)
    for exif in (b"", b"Exif\0\0", b"Exif\0\0nonsense", b"Exif\0\0II*\0" + b"\xff" * 20):
        content = encoded(Image.new("RGB", (6, 4), RED), "JPEG", exif=exif)
        assert open_picture(content).size == (6, 4)
        assert picture_header(content).size == (6, 4)


@pytest.mark.parametrize("orientation", [0, 9, 60000])
def test_an_orientation_that_is_none_turns_nothing(orientation):
    assert open_picture(with_broken_exif(orientation)).size == (6, 4)


def test_16_bit_picture_is_rotated_too():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert open_picture(encoded(Image.fromarray(np.zeros((4, 6), np.uint16)), exif=exif)).size == (
        4,
        6,
    )


def test_a_picture_in_memory_is_taken_and_left_as_it_was():
    picture = Image.new("RGB", (4, 4), RED)
    opened = open_picture(picture)
    opened.putpixel((0, 0), GREEN)
    assert picture.getpixel((0, 0)) == RED


def test_too_many_pixels_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    file = tmp_path / "large.png"
    Image.new("1", (9000, 9000)).save(file)
    assert file.stat().st_size < 20000

    def load(picture):
        raise AssertionError("decoded")

    monkeypatch.setattr(Image.Image, "load", load)
    for read in (open_picture, picture_header):
        with (
            pytest.raises(DataError, match=r"large\.png.*9000 x 9000 = 81000000"),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("error")
            read(file)
    monkeypatch.setattr(decode, "PIXEL_LIMIT", 81_000_000)
    assert picture_header(file).size == (9000, 9000)


def test_pillows_own_limit_is_a_data_error(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for side in (12, 20):  # a warning and an error of Pillow's
        Image.new("RGB", (side, side)).save(tmp_path / "a.png")
        with pytest.raises(DataError, match="too large"):
            picture_header(tmp_path / "a.png")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no picture",
        encoded(Image.effect_noise((64, 64), 50))[:-400],
        encoded(Image.effect_noise((64, 64), 50), "JPEG")[:-400],
        encoded(Image.new("F", (4, 4), 0.5), "TIFF"),
        encoded(Image.new("I", (4, 4), 70000), "TIFF"),
        None,
    ],
)
def test_broken_files_name_their_path(tmp_path, content):
    file = tmp_path / "this one.png"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match=r"this one\.png") as caught:
        open_picture(file)
    assert "\n" not in str(caught.value)
