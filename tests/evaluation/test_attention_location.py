"""attention_location, on maps whose area under the ROC curve is known."""

import pytest
import torch

from sdtrain.data.shapes import Attributes, canonical_caption
from sdtrain.evaluation.attention_location import mean_areas
from sdtrain.generation.attention_maps import WORD, WordMap

RED_STAR = Attributes(shape="star", colour="red", size="large", background="blue")
MASK = torch.zeros(4, 4, dtype=torch.bool)
MASK[1:3, 1:3] = True


def maps_of(shape, colour, background):
    """The maps of all words of the standard caption: those given, and others of zeros."""
    given = {"star": shape, "red": colour, "blue": background}
    words = WORD.findall(canonical_caption(RED_STAR))
    return [WordMap(word, given.get(word, torch.zeros(4, 4))) for word in words]


def test_the_areas_are_those_of_the_words():
    inside = MASK.float()
    found = mean_areas([maps_of(inside, 1 - inside, 1 - inside)], [RED_STAR], [MASK])
    assert found == {"shape": 1, "colour": 0, "background": 1}
    constant = torch.ones(4, 4)
    found = mean_areas([maps_of(constant, inside, inside)], [RED_STAR], [MASK])
    assert found == {"shape": 0.5, "colour": 1, "background": 0}
    for useless in (MASK & ~MASK, MASK | ~MASK):
        found = mean_areas([maps_of(inside, inside, inside)], [RED_STAR], [useless])
        assert found == {"shape": 0.5, "colour": 0.5, "background": 0.5}


def test_they_are_means_over_the_pictures():
    inside = MASK.float()
    both = [maps_of(inside, inside, inside), maps_of(1 - inside, inside, inside)]
    assert mean_areas(both, [RED_STAR] * 2, [MASK] * 2)["shape"] == pytest.approx(0.5)
