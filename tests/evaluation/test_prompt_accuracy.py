"""The verifier sees pictures alone. What it should see is known, because the pictures were drawn
from it."""

import pytest
import torch
from torchvision.transforms.v2.functional import gaussian_blur

from sdtrain.data.shapes import COLOURS, RADII, SHAPES, Attributes, Shapes, coverage
from sdtrain.evaluation.prompt_accuracy import shares_right
from sdtrain.evaluation.retrieval import nearest_picture_share
from sdtrain.evaluation.verifier import NOTHING, Verifier

VERIFIER = Verifier(shapes=SHAPES, palette=COLOURS, radii=RADII, coverage=coverage)


def drawn(count: int, image_size: int = 32):
    split = Shapes(image_size=image_size, seed=11).split("validation")
    return torch.stack([split[(i, i)].image for i in range(count)]), [
        split.attributes(i) for i in range(count)
    ]


def accuracy(images, expected) -> dict[str, float]:
    return shares_right(VERIFIER, images, expected)


@pytest.mark.parametrize(("image_size", "count"), [(32, 300), (64, 60)])
def test_clean_pictures_are_read_right(image_size, count):
    assert min(accuracy(*drawn(count, image_size)).values()) >= 0.99


def test_blurred_and_noisy_ones_too():
    images, expected = drawn(200)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    assert accuracy(gaussian_blur(images, 5, 0.7) + 0.05 * noise, expected)["all_four"] >= 0.95


def test_wrong_pictures_are_told():
    images, expected = drawn(100)
    assert accuracy(images, expected[1:] + expected[:1])["all_three"] < 0.1


def test_shares_are_counted_per_attribute():
    images, expected = drawn(4)
    other = {"circle": "square"}
    altered = [
        Attributes(other.get(a.shape, "circle"), a.colour, a.size, a.background)
        for a in expected[:2]
    ] + expected[2:]
    found = accuracy(images, altered)
    assert (found["shape"], found["colour"], found["background_colour"], found["all_three"]) == (
        0.5,
        1,
        1,
        0.5,
    )
    ground = {"white": "black"}
    on_another_ground = [
        Attributes(a.shape, a.colour, a.size, ground.get(a.background, "white")) for a in expected
    ]
    found = accuracy(images, on_another_ground)
    assert (found["shape"], found["background"], found["all_three"], found["all_four"]) == (
        1,
        0,
        0,
        0,
    )
    with pytest.raises(ValueError, match="4 pictures, but .* 3"):
        accuracy(images, expected[:3])


def test_garbage_shows_nothing():
    noise = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert sum(reading.shape == NOTHING for reading in VERIFIER(noise)) >= 7
    plain = VERIFIER(torch.ones(1, 3, 32, 32))[0]
    assert (plain.shape, plain.background) == (NOTHING, "white")
    assert VERIFIER(torch.full((1, 3, 32, 32), float("nan")))[0].background == NOTHING


def test_nearest_picture_share_by_hand():
    pictures = torch.tensor([[0.0], [1.0], [2.0], [10.0], [11.0], [12.0], [13.0]])
    drawn_ = torch.tensor([[0.1], [1.9], [1.0], [0.1], [0.1]])
    # The nearest; the second; the last; the fifth and the sixth.
    found = nearest_picture_share(drawn_, pictures, torch.tensor([0, 1, 6, 4, 5]))
    assert found == pytest.approx({"top_1": 1 / 5, "top_5": 3 / 5})
