"""A run's folder is enough to draw with; the training pictures are asked for where something is
measured against them."""

import json
import shutil

import numpy as np
import pytest
import yaml
from PIL import Image

from sdtrain.assemble.load import load
from sdtrain.assemble.training_data import with_changes
from sdtrain.errors import DataError, UserError
from sdtrain.runs.layout import CheckpointFolder
from sdtrain.runs.manifest import find_checkpoint, list_checkpoints, write_manifest

SMALL = [
    "model/autoencoder=pixels",
    "data.image_size=16",
    "first_stage=null",
    "callbacks=none",
    "validation=none",
    "trainer.max_images=8",
]
FEW = ["num_images=2", "accelerator=cpu", "ema=false"]
QUICK = [*FEW, "steps=2"]
SHORT = ["metrics.sampler_error.steps=[2]", "metrics.sampler_error.reference=4"]


def make_pictures(folder) -> None:
    folder.mkdir()
    for number in range(12):
        pixels = np.full((20, 20, 3), 20 * number, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a grey of {number}")


@pytest.fixture(scope="module")
def trained(train_tiny, tmp_path_factory):
    """A folder with pictures in pics/, and a run that was trained there on data.path=pics."""
    folder = tmp_path_factory.mktemp("trained")
    make_pictures(folder / "pics")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = train_tiny(folder / "run", "data=images", "data.path=pics", *SMALL)
    assert result.code == 0, result.err
    return folder


@pytest.fixture
def elsewhere(trained, tmp_path):
    """The same, copied to where the run was not trained; the place it names does not exist. Its
    path is relative, as typed, and as earlier versions wrote it.
    """
    folder = shutil.copytree(trained, tmp_path / "elsewhere")
    for checkpoint in list_checkpoints(folder / "run"):
        files = CheckpointFolder(checkpoint)
        saved = yaml.safe_load(files.config.read_text())
        saved["data"]["path"] = "pics"
        files.config.write_text(yaml.safe_dump(saved))
        files.manifest.unlink()
        write_manifest(checkpoint)
    record = json.loads((folder / "run" / "data.json").read_text())
    record["working_directory"] = str(tmp_path / "gone")
    (folder / "run" / "data.json").write_text(json.dumps(record))
    return folder


def drawn(here, run, out, cwd, *words) -> np.ndarray:
    settings = ["prompt=a grey of 3", *QUICK, f"output={out}", *words]
    result = here("sdtrain-sample", f"checkpoint={run}", *settings, cwd=cwd)
    assert result.code == 0, result.err
    return np.asarray(Image.open(out / "00001-seed1.png"))


def evaluated(here, run, cwd, *words):
    quick = FEW if "metrics=sampler_error" in words else QUICK  # which has steps of its own
    words = [f"checkpoint={run}", *quick, *words, f"output={cwd}/evaluation"]
    return here("sdtrain-evaluate", *words, cwd=cwd)


def test_drawing_needs_the_folder_of_the_run_alone(here, trained, elsewhere, tmp_path):
    expected = drawn(here, trained / "run", tmp_path / "a", trained)
    shutil.rmtree(elsewhere / "pics")
    (elsewhere / "run" / "config.yaml").unlink()  # a checkpoint has its own
    again = drawn(here, elsewhere / "run", tmp_path / "b", tmp_path)
    assert np.array_equal(again, expected)
    record = json.loads((trained / "run" / "data.json").read_text())
    assert len(set(record["example_prompts"])) == 9  # the captions of the training split
    assert len(set(record["example_prompts"][:9])) > 5


def loaded(run, **changes):
    """The run's checkpoint, with changed arguments of its data set."""
    checkpoint = CheckpointFolder(find_checkpoint(run))
    found = load(checkpoint, ema=False, device="cpu", allow=[], autoencoder=None, data=changes)
    return found.training_data


def test_what_compares_with_the_pictures_asks_for_them_by_a_key_that_exists(
    here, elsewhere, tmp_path, capsys
):
    run = elsewhere / "run"
    with pytest.raises(DataError) as missing:
        _ = loaded(run).data
    assert missing.value.key == "data.path"
    assert f"{tmp_path}/gone/pics" in str(missing.value)
    result = evaluated(here, run, tmp_path, "metrics=retrieval", f"data.path={elsewhere}/pics")
    assert result.code == 0, result.err
    assert not result.err
    # Others than those it was trained on.
    (elsewhere / "pics" / "0.txt").write_text("another caption")
    assert loaded(run, path=f"{elsewhere}/pics").data is not None
    assert "not those that the run was trained on" in capsys.readouterr().err
    for changes, named in (({"pth": "x"}, "'path'"), ({"flip": 2}, "data.flip")):
        with pytest.raises(UserError) as refused:
            _ = loaded(run, **changes).data
        assert named in str(refused.value)


def test_a_relative_path_of_the_run_begins_where_it_was_trained(trained, capsys):
    data = loaded(trained / "run").data
    assert len(data.split("train")) == 9
    assert not capsys.readouterr().err


def test_what_has_no_effect_is_told(here, trained, tmp_path):
    result = evaluated(here, trained / "run", tmp_path, "metrics=sampler_error", *SHORT, "data.a=1")
    assert result.code == 0, result.err
    assert "data has no effect" in result.err
    words = ["prompt=x", *QUICK, "data.path=b, c", f"output={tmp_path}/out"]
    result = here("sdtrain-sample", f"checkpoint={trained}/run", *words)
    assert result.code == 0, result.err
    assert "data has no effect" in result.err


def test_metrics_ask_only_for_pictures_that_they_need(here, elsewhere, tmp_path):
    shutil.rmtree(elsewhere / "pics")
    result = evaluated(here, elsewhere / "run", tmp_path, "metrics=prompt_accuracy")
    assert result.code == 2, result.err
    assert "metrics=prompt_accuracy" in result.paragraph


def test_a_change_of_a_node_keeps_its_other_values():
    arguments = {"path": "x", "columns": {"_target_": "a.b", "image": None, "caption": None}}
    changed = with_changes(arguments, {"path": "y", "columns": {"caption": "words"}})
    assert changed == {
        "path": "y",
        "columns": {"_target_": "a.b", "image": None, "caption": "words"},
    }
    assert arguments["columns"]["caption"] is None
