"""Pictures of every mode come out in known colours, and the transform is a function of (picture, seed, ordinal)."""

import io
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from sdtrain.data import decode as transforms
from sdtrain.data.decode import (
    Transform,
    hold_out,
    hold_out_count,
    open_picture,
    picture_size,
    resize_short_side,
)
from sdtrain.errors import DataError, UserError

RED, GREEN = (255, 0, 0), (0, 255, 0)


def encoded(picture, format="PNG", **options):
    stream = io.BytesIO()
    picture.save(stream, format, **options)
    return stream.getvalue()


def corner(data, **options):
    """The top left pixel."""
    picture = open_picture(data, **options)
    assert picture.mode == "RGB"
    return picture.getpixel((0, 0))


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
@pytest.mark.parametrize(("value", "grey"), [(0, 0), (65535, 255), (0x8080, 128), (300, 1)])
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
    seen = np.asarray(
        open_picture(
            encoded(Image.fromarray(np.ascontiguousarray(stored(upright))), format, exif=exif)
        )
    )
    assert seen.shape == upright.shape
    assert np.abs(seen.astype(int) - upright).mean() < (20 if format == "JPEG" else 1e-9)


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

    def decode(picture):
        raise AssertionError("decoded")

    monkeypatch.setattr(Image.Image, "load", decode)
    for read in (open_picture, picture_size):
        with (
            pytest.raises(DataError, match=r"large\.png.*9000 x 9000 = 81000000"),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("error")
            read(file)
    monkeypatch.setattr(transforms, "PIXEL_LIMIT", 81_000_000)
    assert picture_size(file) == (9000, 9000)


def test_pillows_own_limit_is_a_data_error(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for side in (12, 20):  # a warning and an error of Pillow's
        Image.new("RGB", (side, side)).save(tmp_path / "a.png")
        with pytest.raises(DataError, match="too large"):
            picture_size(tmp_path / "a.png")


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


def test_short_side_becomes_image_size():
    assert resize_short_side(Image.new("RGB", (100, 50)), 20).shape == (3, 20, 40)
    assert resize_short_side(Image.new("RGB", (30, 90), RED), 10)[:, 5, 5].tolist() == [255, 0, 0]


def test_resize_is_antialiased():
    stripes = torch.tensor([0, 0, 0, 255, 255, 0, 0, 0], dtype=torch.uint8).repeat(3, 64, 8)
    assert (
        resize_short_side(stripes, 8).float() - 63.75
    ).abs().max() < 20  # picked pixels would be 255


def coordinates():
    """A picture [3, 40, 50] whose pixels say where they are: channel 0 the row, channel 1 the column."""
    rows, columns = torch.meshgrid(torch.arange(40), torch.arange(50), indexing="ij")
    return torch.stack([rows, columns, 0 * rows]).to(torch.uint8)


def place(image):
    """(top, left, flipped) read off a transformed `coordinates()`."""
    pixels = ((image + 1) * 127.5).round().int()
    return int(pixels[0].min()), int(pixels[1].min()), bool(pixels[1, 0, 0] > pixels[1, 0, -1])


def test_transform_is_a_function_of_seed_and_ordinal():
    def make(seed):
        return Transform(image_size=32, crop="random", flip=True, seed=seed)

    once, again, other = make(0), make(0), make(1)
    forwards = [once(coordinates(), ordinal) for ordinal in range(20)]
    for ordinal in reversed(range(20)):
        assert torch.equal(again(coordinates(), ordinal), forwards[ordinal])
    assert sum(place(other(coordinates(), o)) != place(forwards[o]) for o in range(20)) > 15
    assert forwards[0].shape == (3, 32, 32)
    assert forwards[0].dtype == torch.float32


def test_every_crop_and_both_flips_come_at_their_rate():
    transform = Transform(image_size=32, crop="random", flip=True, seed=0)
    n = 2000
    tops, lefts, flips = map(
        np.array, zip(*[place(transform(coordinates(), o)) for o in range(n)], strict=True)
    )
    for seen, places in ((tops, 9), (lefts, 19), (flips, 2)):
        counts = np.bincount(seen, minlength=places)
        assert len(counts) == places
        # 5 standard deviations of a binomial count
        assert np.abs(counts - n / places).max() < 5 * np.sqrt(n / places * (1 - 1 / places))


def test_centre_and_no_flip():
    transform = Transform(image_size=32, crop="center", flip=False, seed=0)
    assert {place(transform(coordinates(), o)) for o in range(30)} == {(4, 9, False)}


def test_flip_does_not_depend_on_the_crop():
    random, centred = (
        Transform(image_size=32, crop=crop, flip=True, seed=3) for crop in ("random", "center")
    )
    assert [place(random(coordinates(), o))[2] for o in range(50)] == [
        place(centred(coordinates(), o))[2] for o in range(50)
    ]


def test_black_and_white_are_the_ends_of_the_range():
    transform = Transform(image_size=1, crop="center", flip=False, seed=0)
    assert transform(
        torch.tensor([0, 255, 51], dtype=torch.uint8).reshape(3, 1, 1), 0
    ).flatten().tolist() == pytest.approx([-1, 1, -0.6])


def test_unknown_crop():
    with pytest.raises(UserError, match=r"data\.crop='middle'"):
        Transform(image_size=8, crop="middle", flip=False, seed=0)


@pytest.mark.parametrize(
    ("pictures", "held_out"),
    [(2, 1), (3, 1), (8, 2), (100, 25), (256, 64), (1000, 64), (1280, 64), (10000, 500)],
)
def test_hold_out_count(pictures, held_out):
    assert hold_out_count(pictures, 0.05) == held_out
    assert len(hold_out([str(i) for i in range(pictures)], 0.05, 0)) == held_out


def test_hold_out_moves_few_and_follows_the_seed():
    names = [f"{i}.png" for i in range(1000)]
    before = hold_out(names, 0.1, 0)
    assert before == hold_out(names[::-1] + names[:10], 0.1, 0)
    assert len(before ^ hold_out([*names, "new.png"], 0.1, 0)) <= 2
    assert len(before & hold_out(names, 0.1, 1)) < 30  # 10 of 100 by chance
