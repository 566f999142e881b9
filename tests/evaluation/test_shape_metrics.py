"""depth_overlap and class_accuracy, on pictures whose values are known."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sdtrain.data.shapes import Attributes, Shapes, label_of
from sdtrain.errors import UserError
from sdtrain.evaluation.class_accuracy import ClassAccuracy, ShapeClass
from sdtrain.evaluation.depth_overlap import DepthOverlap, intersection_over_union

COUNT = 12
DATA = Shapes(validation_size=64, size=64)
ATTRIBUTES = DATA.split("validation").attributes


def subject(reads, drawn):
    """A subject whose pictures are drawn(request)."""
    return SimpleNamespace(
        reads=frozenset(reads),
        seed=3,
        num_images=COUNT,
        data=DATA,
        data_source=SimpleNamespace(data_class=Shapes),
        draw=lambda requests: torch.stack([drawn(request) for request in requests]),
    )


def row_of(request):
    """The row of the data that a request was made of."""
    for name in ("validation", "held_out"):
        split = DATA.split(name)
        for index in range(len(split)):
            row = split[index, index]
            if row.caption == request.prompt and torch.equal(row.depth, request.depth):
                return row
    raise AssertionError("the request belongs to no row")


def test_pictures_of_the_data_follow_their_depth_maps_and_captions():
    found = DepthOverlap().measure(subject({"caption", "depth"}, lambda each: row_of(each).image))
    assert found.columns.keys() == {"trained", "held_out"} == found.pictures.keys()
    for column in found.columns.values():
        assert column["overlap"] > 0.9
        assert column["overlap_from_0.7"] == column["colour"] == column["background"] == 1


def test_a_shape_in_another_place_does_not_follow_its_depth_map():
    def moved(request):
        return row_of(request).image.roll(12, dims=-1)

    column = DepthOverlap().measure(subject({"caption", "depth"}, moved)).columns["trained"]
    assert column["overlap"] < 0.5 and column["overlap_from_0.7"] < 0.3
    assert column["background"] == 1


def test_overlap_of_masks():
    one = np.array([[True, True, False, False]])
    other = np.array([[False, True, True, False]])
    assert intersection_over_union(one, other) == pytest.approx(1 / 3)
    assert intersection_over_union(one, one) == intersection_over_union(~one & one, ~one & one) == 1


def test_classes_are_recognised():
    split = DATA.split("train")
    picture_of = {split[i, i].label: split[i, i].image for i in range(len(split))}

    def drawn(request):
        return picture_of.get(request.label, torch.zeros(3, 32, 32))

    found = ClassAccuracy().measure(subject({"label"}, drawn)).columns["classes"]
    drawable = np.mean([label in picture_of for label in range(COUNT)])
    assert 0 < drawable < 1
    assert found == {"shape": drawable, "colour": drawable, "both": drawable}


def test_a_label_stands_for_its_shape_and_colour():
    for shape, colour in (("circle", "red"), ("ring", "black"), ("star", "yellow")):
        attributes = Attributes(shape=shape, colour=colour, size="small", background="white")
        assert ShapeClass.of(label_of(attributes)) == ShapeClass(shape, colour)


def test_other_models_are_refused():
    for metric, reads in ((DepthOverlap(), {"caption"}), (ClassAccuracy(), {"caption"})):
        with pytest.raises(UserError):
            metric.check(subject(reads, None))
        other = subject({"label", "depth"}, None)
        metric.check(other)
        other.data_source.data_class = object
        with pytest.raises(UserError):
            metric.check(other)
