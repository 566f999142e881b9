"""Depth maps made with a depth model: complete, kept, made again when something changed."""

import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from depth_models import write_depth_model
from PIL import Image
from rich.console import Console

from sdtrain.data.columns import Columns
from sdtrain.data.dataset import StoredPictures
from sdtrain.data.depth import map_file
from sdtrain.errors import UserError
from sdtrain.models.depth_estimator import DepthEstimator
from sdtrain.precompute.depth import DepthMaps, make_depth_maps
from sdtrain.signals import Interrupted

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def depth_model(tmp_path_factory):
    return write_depth_model(tmp_path_factory.mktemp("depth") / "model")


@pytest.fixture
def load(pictures, images_of, depth_model, tmp_path):
    def make(**options):
        given = {"depth": str(tmp_path / "depth"), "depth_model": str(depth_model)}
        return images_of(pictures, **given | options)

    return make


def complete(data, check_signals=lambda: None):
    """Make the depth maps, and return the lines that were printed."""
    console = Console(width=200)
    with console.capture() as capture:
        make_depth_maps(data, CPU, console, check_signals)
    return capture.get()


def test_each_picture_gets_what_the_model_estimates(load, pictures, depth_model, tmp_path):
    data = load()
    assert "12 of 12 depth maps" in complete(data)
    estimator = DepthEstimator(str(depth_model), "data.depth_model", CPU)
    for name in sorted(path.name for path in pictures.glob("*.png")):
        with Image.open(pictures / name) as picture:
            expected = estimator(picture.convert("RGB"))
        with Image.open(tmp_path / "depth" / f"{name}.png") as found:
            assert (found.mode, found.size) == ("L", picture.size)
            assert np.array_equal(np.asarray(found), np.asarray(expected))
        assert (np.min(expected), np.max(expected)) == (0, 255)
    row = data.split("train")[0, 0]
    assert row.depth.shape == (1, *row.image.shape[1:])


def test_maps_are_made_again_only_where_something_changed(load, pictures, paint, tmp_path):
    complete(load())
    assert "all 12 depth maps" in complete(load())
    map_of = {name: tmp_path / "depth" / f"{name}.png" for name in ("03.png", "05.png")}
    before = {name: path.read_bytes() for name, path in map_of.items()}
    paint(pictures / "03.png", 99)
    map_of["05.png"].unlink()
    assert "2 of 12 depth maps" in complete(load())
    assert map_of["03.png"].read_bytes() != before["03.png"]
    assert map_of["05.png"].read_bytes() == before["05.png"]
    other = write_depth_model(tmp_path / "other", seed=1)
    assert "12 of 12 depth maps" in complete(load(depth_model=str(other)))
    assert map_of["05.png"].read_bytes() != before["05.png"]
    assert "12 of 12 depth maps" in complete(load())
    assert map_of["05.png"].read_bytes() == before["05.png"]


def test_pictures_of_another_folder_do_not_take_the_maps(load, images_of, paint, tmp_path):
    complete(load())
    others = tmp_path / "others"
    others.mkdir()
    for number in range(12):
        paint(others / f"{number:02}.png", 50 + number)
        (others / f"{number:02}.txt").write_text("other")
    first = load()
    depth = first.split("train").depth_of
    other = images_of(others, depth=depth.path, depth_model=depth.model)
    assert "12 of 12 depth maps" in complete(other)
    assert "12 of 12 depth maps" in complete(load())


def test_a_map_that_was_being_replaced_is_made_again(load, depth_model, monkeypatch, tmp_path):
    complete(load())
    other = write_depth_model(tmp_path / "other", seed=1)
    write = DepthMaps._write

    def killed(self, name, estimator, picture):
        write(self, name, estimator, picture)
        raise Interrupted(137)

    monkeypatch.setattr(DepthMaps, "_write", killed)
    with pytest.raises(Interrupted):
        complete(load(depth_model=str(other)))
    monkeypatch.undo()
    assert "12 of 12 depth maps" in complete(load())


def test_depth_maps_are_no_pictures(load, pictures):
    with pytest.raises(UserError, match="lies in"):
        load(depth=str(pictures / "depth"))


def test_the_code_of_a_model_is_not_run(load, depth_model, tmp_path, monkeypatch):
    """Nor is anybody asked whether it may be."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    foreign = shutil.copytree(depth_model, tmp_path / "foreign")
    config = json.loads((foreign / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (foreign / "config.json").write_text(json.dumps(config))
    (foreign / "own.py").write_text("raise SystemExit(99)")
    with pytest.raises(UserError) as caught:
        complete(load(depth_model=str(foreign)))
    assert caught.value.key == "data.depth_model"


def test_an_interrupted_start_is_continued(load):
    def interrupt():
        raise Interrupted(130)

    with pytest.raises(Interrupted):
        complete(load(), interrupt)
    assert "all 12" in complete(load())  # one batch of pictures was made and recorded


def test_a_broken_picture_is_skipped_or_named(load, pictures):
    whole = (pictures / "04.png").read_bytes()
    (pictures / "04.png").write_bytes(whole[: len(whole) - 40])
    with pytest.raises(UserError, match="04.png"):
        complete(load())
    assert "12 of 12" in complete(load(on_error="skip"))
    data = load(on_error="skip")
    for index in range(len(data.split("train"))):
        assert data.split("train")[index, index].depth is not None


def test_files_of_the_user_are_not_replaced(load, tmp_path):
    folder = tmp_path / "depth"
    folder.mkdir()
    (folder / "00.png").write_bytes(b"mine")
    with pytest.raises(UserError) as caught:
        complete(load())
    assert caught.value.key == "data.depth_model"
    assert os.listdir(folder) == ["00.png"]


def test_a_model_that_cannot_be_read_is_named(load, tmp_path):
    (tmp_path / "empty").mkdir()
    for model in (tmp_path / "missing", tmp_path / "empty"):
        with pytest.raises(UserError) as caught:
            complete(load(depth_model=str(model)))
        assert caught.value.key == "data.depth_model"
        assert not (tmp_path / "depth").exists()


def test_rows_of_a_file_have_a_map_each(depth_model, tmp_path):
    encoded = []
    for shade in range(8):
        picture = io.BytesIO()
        pixels = np.random.default_rng(shade).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(picture, "PNG")
        encoded.append(picture.getvalue())
    pq.write_table(pa.table({"image": encoded, "text": ["noise"] * 8}), tmp_path / "a.parquet")
    options = {"image_size": 16, "depth_model": str(depth_model)}
    data = StoredPictures(path=str(tmp_path / "a.parquet"), **options)
    complete(data)
    folder = data.split("train").depth_of.path
    names = [name for split in ("train", "validation") for name in data.split(split).names]
    assert len({map_file(folder, name).read_bytes() for name in names}) == 8
    for name in ("../outside", "/outside", "a/../../outside", "./a", "a//b", "long" * 99):
        assert map_file(folder, name).resolve().parent == Path(folder).resolve()
    with pytest.raises(UserError, match="both say"):
        StoredPictures(path=str(tmp_path / "a.parquet"), columns=Columns(depth="text"), **options)


def test_the_inverse_of_a_distance_is_drawn(depth_model, monkeypatch):
    estimator = DepthEstimator(str(depth_model), "data.depth_model", CPU)
    picture = Image.fromarray(np.zeros((2, 2, 3), dtype=np.uint8))
    output = torch.tensor([[1.0, 2.0], [4.0, 4.0]])

    def drawn():
        return np.asarray(estimator(picture)).tolist()

    def processed(outputs, target_sizes):
        return [{"predicted_depth": output}]

    monkeypatch.setattr(estimator.processor, "post_process_depth_estimation", processed)
    assert drawn() == [[0, 85], [255, 255]]
    estimator.is_metric = True
    assert drawn() == [[255, 85], [0, 0]]
    output.fill_(3)
    assert drawn() == [[0, 0], [0, 0]]
    output.fill_(torch.nan)
    with pytest.raises(UserError, match="finite"):
        drawn()
