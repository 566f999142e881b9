"""Drawn shapes: a pure function of (seed, split, index), with captions, labels and depth that agree
with the picture.
"""

from itertools import product

import pytest
import torch

from sdtrain.data import shapes
from sdtrain.data.shapes import (
    COLOURS,
    RADII,
    SHAPES,
    SIZES,
    Shapes,
    evaluation_prompts,
    is_held_out,
)
from sdtrain.errors import UserError

# What a person would accept for each word; written here by hand, not taken from the code under
# test.
SAID = {
    "circle": ["circle", "disc"],
    "square": ["square", "box"],
    "triangle": ["triangle"],
    "star": ["star"],
    "cross": ["cross", "plus sign"],
    "ring": ["ring", "hoop"],
    "large": ["large", "big", "huge"],
    "small": ["small", "little", "tiny"],
    "red": ["red", "scarlet"],
    "purple": ["purple", "violet"],
    **{name: [name] for name in ("green", "blue", "yellow", "orange", "white", "black")},
}
TRIPLES = [(s, c, b) for s, c, b in product(SHAPES, COLOURS, COLOURS) if c != b]


def test_there_is_enough_to_draw():
    assert (
        len(SHAPES) >= 6
        and len(COLOURS) >= 8
        and len(SIZES) == 2
        and len(set(shapes._TEMPLATES)) >= 12
    )


def test_a_picture_depends_on_seed_split_and_index_alone():
    forward = [Shapes().split("train")[(i, 7 * i)] for i in range(20)]
    again = Shapes().split("train")
    backward = [again[(i, 0)] for i in reversed(range(20))][::-1]
    assert all(
        torch.equal(a.image, b.image) and a.caption == b.caption
        for a, b in zip(forward, backward, strict=True)
    )
    assert not torch.equal(forward[0].image, Shapes(seed=1).split("train")[(0, 0)].image)
    assert not torch.equal(forward[0].image, Shapes().split("validation")[(0, 0)].image)


def test_a_tenth_of_the_triples_is_held_out_and_every_word_is_still_trained():
    held = [t for t in TRIPLES if is_held_out(*t)]
    assert 0.07 <= len(held) / len(TRIPLES) <= 0.13
    trained = set(TRIPLES) - set(held)
    for place, words in enumerate((SHAPES, COLOURS, COLOURS)):
        assert {t[place] for t in trained} == set(words)


def test_splits_keep_to_their_triples():
    data = Shapes(seed=3)
    for name, wanted in (("train", False), ("validation", False), ("held_out", True)):
        split = data.split(name)
        seen = [split.attributes(i) for i in range(400)]
        assert {is_held_out(a.shape, a.colour, a.background) for a in seen} == {wanted}
        assert all(a.colour != a.background for a in seen)


def test_every_caption_says_all_four_in_many_ways():
    split = Shapes().split("train")
    frames = set()
    for index in range(600):
        what = split.attributes(index)
        caption = split[(index, 0)].caption
        frame = f" {caption} ".replace(",", " , ")
        for word in (what.size, what.colour, what.shape, what.background):
            said = [
                synonym
                for synonym in SAID[word]
                if f" {synonym} " in frame.replace("five-pointed ", "")
            ]
            assert said, f"{caption!r} does not say {word}"
            frame = frame.replace(f" {said[0]} ", " _ ", 1)
        frames.add(frame)
    assert len(frames) >= 12


def test_the_shape_lies_inside_and_the_depth_is_its_distance():
    split = Shapes().split("train")
    for index in range(200):
        row = split[(index, 0)]
        what = split.attributes(index)
        ground = torch.tensor(COLOURS[what.background]) / 127.5 - 1
        edge = torch.cat(
            [row.image[:, 0], row.image[:, -1], row.image[:, :, 0], row.image[:, :, -1]], dim=1
        )
        assert (edge - ground[:, None]).abs().max() < 1e-6
        shape = torch.tensor(COLOURS[what.colour]) / 127.5 - 1
        covered = ((row.image - ground[:, None, None]) * (shape - ground)[:, None, None]).sum(0) / (
            shape - ground
        ).square().sum()
        assert torch.equal(row.depth[0] > 0, covered > 0.5)
        near = (
            row.depth.max().item() * RADII["large"][1]
        )  # the apparent radius, as a share of the side
        low, high = RADII[what.size]
        assert low - 1e-6 <= near <= high + 1e-6 and row.depth[row.depth > 0].unique().numel() == 1
        assert row.image.dtype == row.depth.dtype == torch.float32 and row.image.abs().max() <= 1


def test_labels_name_shape_and_colour():
    split = Shapes().split("train")
    pairs = {}
    for index in range(1000):
        what = split.attributes(index)
        label = split[(index, 0)].label
        assert 0 <= label < Shapes.num_classes and pairs.setdefault(
            label, (what.shape, what.colour)
        ) == (what.shape, what.colour)
    assert len(set(pairs.values())) == len(pairs) == Shapes.num_classes == 48


def test_prompts_for_people_and_for_measuring():
    prompts = Shapes().example_prompts(24)
    assert prompts[:5] == Shapes().example_prompts(5) and len(set(prompts)) == 24
    for held_out in (False, True):
        asked = evaluation_prompts(64, held_out, seed=0)
        assert (
            asked[:8]
            == evaluation_prompts(8, held_out, seed=0)
            != evaluation_prompts(8, held_out, seed=1)
        )
        assert {is_held_out(a.shape, a.colour, a.background) for _, a in asked} == {held_out}


@pytest.mark.parametrize(("key", "value"), [("size", 0), ("validation_size", 0), ("image_size", 8)])
def test_bad_options_name_their_key(key, value):
    with pytest.raises(UserError, match=f"data.{key}"):
        Shapes(**{key: value})
