"""The transform is a function of (picture, seed, ordinal), each crop and flip at its rate."""

import numpy as np
import pytest
import torch
from PIL import Image

from sdtrain.data.crop import Transform, resize_to_cover
from sdtrain.errors import UserError

RED = (255, 0, 0)


def test_a_picture_covers_a_size():
    assert resize_to_cover(Image.new("RGB", (100, 50)), (20, 20)).shape == (3, 20, 40)
    assert resize_to_cover(Image.new("RGB", (30, 90), RED), (10, 10))[:, 5, 5].tolist() == [
        255,
        0,
        0,
    ]


def test_resize_is_antialiased():
    stripes = torch.tensor([0, 0, 0, 255, 255, 0, 0, 0], dtype=torch.uint8).repeat(3, 64, 8)
    assert (
        resize_to_cover(stripes, (8, 8)).float() - 63.75
    ).abs().max() < 20  # picked pixels would be 255


def coordinates():
    """A picture [3, 40, 50] whose pixels say where they are: channel 0 the row, channel 1 the
    column.
    """
    rows, columns = torch.meshgrid(torch.arange(40), torch.arange(50), indexing="ij")
    return torch.stack([rows, columns, 0 * rows]).to(torch.uint8)


def place(image):
    """(top, left, flipped) read off a transformed `coordinates()`."""
    pixels = ((image + 1) * 127.5).round().int()
    return int(pixels[0].min()), int(pixels[1].min()), bool(pixels[1, 0, 0] > pixels[1, 0, -1])


def test_transform_is_a_function_of_seed_and_ordinal():
    def make(seed):
        return Transform(image_size=32, crop="random", flip=True, seed=seed)

    once = make(0)
    again = make(0)
    other = make(1)
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
    with pytest.raises(UserError) as refused:
        Transform(image_size=8, crop="middle", flip=False, seed=0)
    assert (refused.value.key, refused.value.value) == ("data.crop", "middle")
