"""Runs with other conditions than a caption: resumed, on two ranks, looked at or not, cached."""

import io
import shutil

import pytest
import stored_pictures
import torch
from depth_models import write_depth_model
from PIL import Image
from reading import BARE, checkpoints, flattened, lines, same, tensors

RUNS = {
    "depth": ["model/channels=[depth]", "model.channels.depth.dropout=0.5"],
    "inpainting": ["model/channels=[inpainting]"],
    "two": ["model/channels=[depth,inpainting]", "guidance=two_conditions"],
    "class": ["experiment=class_conditional"],
    "unconditional": ["experiment=unconditional"],
    "pixels": ["experiment=pixels", "model.unet.attention=[true,true]"],
}
NAMES = [name if name == "depth" else pytest.param(name, marks=pytest.mark.slow) for name in RUNS]


@pytest.fixture(scope="module")
def straight(train_tiny, tmp_path_factory):
    """straight(NAME) -> a run of that name, to its end, with samples and validation."""
    folder = tmp_path_factory.mktemp("straight")

    def run_of(name):
        run = folder / name
        if not run.exists():
            result = train_tiny(run, *RUNS[name], "checkpoint.keep=9")
            assert result.code == 0, result.err
        return run

    return run_of


def weights(run):
    return tensors(checkpoints(run)[-1])


@pytest.mark.parametrize("name", NAMES)
def test_resumed_in_the_middle_it_ends_in_the_same_weights(train_tiny, straight, name, tmp_path):
    run = straight(name)
    middle = checkpoints(run)[1]
    shutil.copytree(middle, tmp_path / "run/checkpoints" / middle.name)
    result = train_tiny(tmp_path / "run", *RUNS[name], "checkpoint.keep=9", "resume=must")
    assert result.code == 0, result.err
    assert same(weights(tmp_path / "run"), weights(run))


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_samples_and_validation_change_no_weight(train_tiny, straight, name, tmp_path):
    never = ["callbacks.samples.every=0", "validation.every=0"]
    result = train_tiny(tmp_path / "run", *RUNS[name], *never)
    assert result.code == 0, result.err
    assert same(weights(tmp_path / "run"), weights(straight(name)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["depth", "inpainting", "two"])
def test_two_ranks_train_like_one(command, tiny, straight, name, tmp_path):
    ranks = ["strategy=ddp", "trainer.devices=2", f"hydra.run.dir={tmp_path}/run"]
    result = command("sdtrain", *tiny(*RUNS[name]), *ranks)
    assert result.code == 0, result.err
    difference = flattened(weights(tmp_path / "run")) - flattened(weights(straight(name)))
    assert 0 < difference.norm() < 1e-4


def losses(run):
    return torch.tensor([line["train/loss"] for line in lines(run) if "train/loss" in line])


@pytest.mark.slow
def test_depth_comes_from_a_folder_a_column_or_a_model_with_a_cache_or_without(
    train_tiny, tmp_path
):
    """The same weights wherever the same maps are read; the same losses from a cache."""
    made = stored_pictures.with_depth(stored_pictures.rows(32))
    folder = stored_pictures.write_folder(tmp_path / "folder", made)
    for row in made:
        file = tmp_path / "maps" / f"{row['name']}.png"
        file.parent.mkdir(exist_ok=True)
        Image.open(io.BytesIO(row["depth"])).save(file)
    stored = stored_pictures.write_parquet(tmp_path / "parquet", made)
    model = write_depth_model(tmp_path / "model")
    usual = [
        *RUNS["depth"],
        *BARE,
        "data.image_size=16",
        "data.num_workers=0",
        "data.flip=true",
        "model.autoencoder.path=data/shapes_autoencoder",
        "trainer.log_every=8",
    ]
    sources = {
        "folder": ["data=images", f"data.path={folder}", f"data.depth={tmp_path}/maps"],
        "column": ["data=dataset", f"data.path={stored}", "data.columns.depth=depth"],
        "model": ["data=images", f"data.path={folder}", f"data.depth_model={model}"],
    }
    sources["cache"] = [*sources["folder"], f"data.cache={tmp_path}/cache"]
    for name, words in sources.items():
        result = train_tiny(tmp_path / name / "run", *words, *usual)
        assert result.code == 0, result.err
    runs = {name: tmp_path / name / "run" for name in sources}
    assert same(weights(runs["column"]), weights(runs["folder"]))
    assert not same(weights(runs["model"]), weights(runs["folder"]))
    torch.testing.assert_close(losses(runs["cache"]), losses(runs["folder"]), rtol=1e-5, atol=0)


@pytest.mark.slow
def test_a_probe_makes_no_depth_maps_and_precompute_only_them(
    train_tiny, here, tiny, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    pictures = stored_pictures.write_folder(tmp_path / "folder", stored_pictures.rows(32))
    model = write_depth_model(tmp_path / "model")
    words = [
        *RUNS["depth"],
        "data=images",
        f"data.path={pictures}",
        f"data.depth_model={model}",
        "data.image_size=16",
        "model/autoencoder=pixels",
        "model.unet.attention=[true,true]",
    ]
    result = train_tiny(tmp_path / "run", *words, "trainer.probe=true")
    assert result.code == 0, result.err
    assert not (tmp_path / "xdg/sdtrain/depth").exists()
    more = ["data.cache=off", f"hydra.run.dir={tmp_path}/none"]
    result = here("sdtrain-precompute", *tiny(*words, *more), cwd=tmp_path)
    assert result.code == 0, result.err
    assert len(list((tmp_path / "xdg/sdtrain/depth").rglob("*.png"))) == 32
