"""Depth maps on the command line: drawn from, estimated, and what is wrong with them."""

import json
import re

import numpy as np
import pytest
from depth_models import write_depth_model
from PIL import Image

QUICK = ["num_images=1", "steps=2", "accelerator=cpu", "ema=false", "prompt=a star"]


@pytest.fixture(scope="module")
def depth_run(train_tiny, tmp_path_factory):
    run = tmp_path_factory.mktemp("trained") / "run"
    result = train_tiny(run, "model/channels=[depth]", "trainer.max_images=8", "callbacks=none")
    assert result.code == 0, result.err
    return run


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A picture, its depth map, one of another shape, and a depth model."""
    folder = tmp_path_factory.mktemp("files")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "picture.png")
    Image.fromarray(pixels[..., 0]).save(folder / "depth.png")
    Image.fromarray(pixels[:, :40, 0]).save(folder / "square.png")
    write_depth_model(folder / "model")
    return folder


def notes(path) -> dict:
    return json.loads(Image.open(path).text["sdtrain"])


def test_depth_is_given_or_estimated(here, depth_run, files, tmp_path):
    words = [f"checkpoint={depth_run}", *QUICK, f"output={tmp_path}"]
    drawn = []
    for more in (
        [f"depth={files}/depth.png"],
        [f"depth={files}/square.png"],
        [f"init_image={files}/picture.png", f"depth_model={files}/model", "strength=1"],
    ):
        result = here("sdtrain-sample", *words, *more)
        assert result.code == 0, result.err
        with Image.open(tmp_path / "00000-seed0.png") as picture:
            drawn.append(picture.tobytes())
        with Image.open(tmp_path / "grid.png") as grid:
            assert grid.width > 2 * 64  # the condition stands beside the picture
    assert len(set(drawn)) == 3
    found = notes(tmp_path / "00000-seed0.png")
    assert found["depth_model"] == f"{files}/model" and "depth" not in found


@pytest.mark.parametrize(
    ("words", "key"),
    [
        ([], "depth"),
        (["init_image=FILES/picture.png"], "depth"),
        (["init_image=FILES/picture.png", "depth=FILES/square.png"], "depth"),
        (["init_image=FILES/picture.png", "depth_model=FILES"], "depth_model"),
        (["init_image=FILES/picture.png", "depth_model=nowhere"], "depth_model"),
        (["depth=FILES/model"], "depth"),
        (["depth=FILES/depth.png", "guidance=two_conditions", "label=3"], "label"),
    ],
)
def test_what_is_wrong_with_depth_is_named(here, depth_run, files, tmp_path, words, key):
    given = [word.replace("FILES", str(files)) for word in words]
    output = f"output={tmp_path}/a/b"
    result = here("sdtrain-sample", f"checkpoint={depth_run}", *QUICK, *given, output)
    assert result.code in (2, 3)
    assert re.search(rf"(?<![/\w]){key}(?!\w|\.png)", result.paragraph)
    assert not list(tmp_path.iterdir())


def test_a_model_without_depth_takes_none(here, tiny_run, files, tmp_path):
    given = ["init_image=FILES/picture.png", "depth_model=FILES/model"]
    for words in (["depth=FILES/depth.png"], given):
        typed = [word.replace("FILES", str(files)) for word in words]
        result = here(
            "sdtrain-sample", f"checkpoint={tiny_run}", *QUICK, *typed, f"output={tmp_path}"
        )
        assert result.code == 2 and "reads no depth maps" in result.paragraph
        assert not list(tmp_path.iterdir())
