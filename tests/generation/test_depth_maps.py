"""Depth maps for sdtrain-sample: read, estimated, and paired with start pictures."""

import numpy as np
import pytest
import torch
from depth_models import write_depth_model
from PIL import Image
from untrained import SIZE, make

from sdtrain.errors import UserError
from sdtrain.generation.depth_maps import estimate_depth_maps, pair, read_depth_maps
from sdtrain.generation.start_pictures import read_start_pictures
from sdtrain.models.depth_estimator import DepthEstimator

CPU = torch.device("cpu")


@pytest.fixture
def pictures(tmp_path):
    """A folder of two pictures, twice as wide as high."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 256, (2 * SIZE, 4 * SIZE, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def model():
    return make("text")


def test_depth_is_estimated_of_the_whole_picture(pictures, model, tmp_path):
    depth_model = str(write_depth_model(tmp_path / "model"))
    starts = read_start_pictures(str(pictures), None, SIZE, model)
    found = estimate_depth_maps(starts, depth_model, SIZE, CPU)
    folder = tmp_path / "maps"
    folder.mkdir()
    estimator = DepthEstimator(depth_model, "depth_model", CPU)
    for start in starts:
        estimator(Image.open(start.file)).save(folder / start.file.name)
    expected = read_depth_maps(str(folder), SIZE)
    assert [each.file for each in found] == [None, None]
    for one, other in zip(found, expected, strict=True):
        assert one.values.shape == (1, SIZE, SIZE)
        assert torch.equal(one.values, other.values)
    assert not torch.equal(found[0].values, found[1].values)


def test_depth_maps_belong_to_pictures_of_their_shape(pictures, model, tmp_path):
    starts = read_start_pictures(str(pictures), None, SIZE, model)
    maps = {}
    for name, size in {"same": (40, 20), "square": (40, 40)}.items():
        Image.new("L", size, 99).save(tmp_path / f"{name}.png")
        maps[name] = read_depth_maps(str(tmp_path / f"{name}.png"), SIZE)
    given = pair(starts, maps["same"])
    assert [each.start for each in given] == starts
    assert all(each.depth is maps["same"][0] for each in given)
    with pytest.raises(UserError, match="40 x 40 pixels"):
        pair(starts, maps["square"])
    with pytest.raises(UserError, match="3 depth maps"):
        pair(starts, maps["same"] * 3)
