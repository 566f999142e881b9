"""Depth maps of real pictures: cropped and mirrored as they are, and clear errors."""

import numpy as np
import pytest
import torch
from PIL import Image

from sdtrain.data.images import Images
from sdtrain.errors import DataError

COUNT = 12


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folders(tmp_path):
    """Pictures, and for each a depth map that equals its red channel."""
    draw = np.random.default_rng(0)
    for i in range(COUNT):
        small = draw.integers(0, 256, (5, 8, 1), dtype=np.uint8).repeat(3, 2)
        picture = np.asarray(Image.fromarray(small).resize((48, 32)))
        save(tmp_path / f"pictures/part/{i}.png", picture)
        (tmp_path / f"pictures/part/{i}.txt").write_text("a picture")
        save(tmp_path / f"depth/part/{i}.png", picture[..., 0])
    return tmp_path


def load(folders, **options):
    depth = str(folders / "depth")
    return Images(path=str(folders / "pictures"), depth=depth, image_size=16, **options)


def test_a_depth_map_is_cropped_and_mirrored_as_its_picture(folders):
    for options in ({}, {"crop": "random", "flip": True}, {"buckets": True, "bucket_step": 4}):
        data = load(folders, **options)
        for name in ("train", "validation"):
            split = data.split(name)
            for ordinal in range(8):
                row = split[(ordinal % len(split), ordinal)]
                assert row.depth.shape == (1, *row.image.shape[1:])
                assert 0 <= row.depth.min() and row.depth.max() <= 1
                torch.testing.assert_close(row.depth * 2 - 1, row.image[:1], rtol=0, atol=0.02)


def test_without_a_folder_there_are_none(folders):
    data = Images(path=str(folders / "pictures"), image_size=16)
    assert data.split("train")[(0, 0)].depth is None


def test_what_is_wrong_is_named(folders):
    depth = folders / "depth/part"

    def refused():
        with pytest.raises(DataError) as caught:
            data = load(folders)
            for name in ("train", "validation"):
                split = data.split(name)
                for index in range(len(split)):
                    split[(index, index)]
        assert caught.value.key == "data.depth"
        return str(caught.value)

    sound = (depth / "3.png").read_bytes()
    save(depth / "3.png", np.zeros((32, 32), dtype=np.uint8))
    assert "3.png" in refused()
    (depth / "3.png").write_bytes(sound[:60])
    assert "3.png" in refused()
    skipping = load(folders, on_error="skip")
    rows = [skipping.split("train")[i, i] for i in range(len(skipping.split("train")))]
    rows += [skipping.split("validation")[i, i] for i in range(len(skipping.split("validation")))]
    assert [name for row in rows for name, _ in row.skipped] == ["part/3.png"]
    (depth / "3.png").unlink()
    with pytest.raises(DataError, match="no depth map of 1 picture in"):
        load(folders)  # before the first step
    Image.fromarray(np.zeros((64, 96), dtype=np.uint8)).save(depth / "3.webp")  # larger, any suffix
    load(folders).split("train")
    (folders / "depth").rename(folders / "elsewhere")
    refused()
