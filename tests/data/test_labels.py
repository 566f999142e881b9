"""Class labels come from subfolders or a column, and a model of labels is refused without them."""

import json
import shutil
from types import SimpleNamespace

import pytest
import yaml
from PIL import Image
from reading import with_values

from sdtrain.assemble.load import load as load_checkpoint
from sdtrain.config.precheck import precheck_config
from sdtrain.data.images import Images
from sdtrain.errors import UserError
from sdtrain.generation.sample import build_requests
from sdtrain.runs.layout import CheckpointFolder
from sdtrain.runs.manifest import find_checkpoint
from sdtrain.runs.resume import FILLED_FROM_DATA, may_resume
from sdtrain.training.parts import saved_config

WORDS = [
    "model/conditioner=class_label",
    "data=images",
    "model/autoencoder=pixels",
    "data.image_size=16",
    "data.num_workers=0",
    "data.batch_size=4",
    "trainer.max_images=8",
    "callbacks=none",
    "validation=none",
]


def paint(folder, names, caption="x"):
    for i, name in enumerate(names):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (i * 5, 20, 90)).save(file)
        file.with_suffix(".txt").write_text(caption)
    return folder


def labels_of(data):
    found = {}
    for split in map(data.split, ("train", "validation")):
        for index, name in enumerate(split.names):
            found[name] = split[index, index].label
    return found


def load(folder):
    return Images(path=str(folder), image_size=16)


FOLDERS = {
    "one for each class": (["dog/a.png", "cat/a.png", "cat/b.png"], ("cat", "dog")),
    "with more below": (["dog/a.png", "cat/old/a.png", "cat/new/b.png"], ("cat", "dog")),
    "in a folder of all": (["all/in/dog/a.png", "all/in/cat/a.png"], ("cat", "dog")),
    "numbers": ([f"{i}/a.png" for i in (10, 9, 1)], ("1", "9", "10")),
    "beside each other": (["a.png", "b.png"], ()),
    "one outside": (["a.png", "cat/b.png", "dog/c.png"], ()),
    "a single one": (["cat/a.png", "cat/b.png"], ()),
}


@pytest.mark.parametrize("layout", FOLDERS)
def test_labels_of_folders(tmp_path, layout):
    files, names = FOLDERS[layout]
    data = load(paint(tmp_path, files))
    assert data.classes.names == names
    assert data.num_classes == max(1, len(names))
    assert bool(data.classes.why_none) != bool(names)
    for name, label in labels_of(data).items():
        assert names[label] in name.split("/") if names else label == 0


COLUMNS = {
    "names": (["fox", "cat", "fox", "dog"], [2, 0, 2, 1], ("cat", "dog", "fox")),
    "numbers": ([1, 0, 2, 1], [1, 0, 2, 1], ()),
    "gap": ([0, 1, 3, 3], None, ()),
    "from 1": ([1, 2, 1, 2], None, ()),
    "negative": ([0, 1, -1, 0], None, ()),
    "huge": ([0, 1, 10**12, 0], None, ()),
    "mixed": ([0, "cat", 1, 0], None, ()),
    "missing": (["cat", None, "dog", "dog"], None, ()),
    "list": ([[1], [0], [1], [0]], None, ()),
    "fraction": ([0.5, 0.5, 1.5, 0.5], None, ()),
    "truth": ([True, False, True, False], None, ()),
}


@pytest.mark.parametrize("values", COLUMNS)
def test_labels_of_a_column(tmp_path, values):
    given, expected, names = COLUMNS[values]
    files = [f"{i}.png" for i in range(4)]
    paint(tmp_path, files)
    rows = []
    for file, label in zip(files, given, strict=True):
        rows.append({"file_name": file, "text": "x", "label": label})
    metadata = tmp_path / "metadata.jsonl"
    metadata.write_text("\n".join(map(json.dumps, rows)))
    data = load(tmp_path)
    found = labels_of(data)
    assert [found[file] for file in files] == (expected or [0] * 4)
    assert data.classes.names == names
    assert data.num_classes == (max(expected) + 1 if expected else 1)
    assert bool(data.classes.why_none) == (expected is None)
    if values == "missing":
        assert "1.png" in data.classes.why_none
    if values in ("names", "numbers"):
        metadata.unlink()
        lines = "".join(f"{file},x,{label}\n" for file, label in zip(files, given, strict=True))
        (tmp_path / "metadata.csv").write_text(f"file_name,text,label\n{lines}")
        assert labels_of(load(tmp_path)) == found


def test_the_folder_is_kept_by_its_whole_path(composed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["data=images", "data.path=pictures"]
    config = precheck_config(composed(*words), words).config
    assert config["data"]["path"] == f"{tmp_path}/pictures"
    before = config | {"data": config["data"] | {"path": "pictures"}}
    assert may_resume(before, config)
    monkeypatch.chdir("/")
    assert not may_resume(before, config)


def test_labels_are_in_a_hash_of_their_own(tmp_path):
    """A run that reads no labels may go on where they have changed; one that reads them not."""
    paint(tmp_path, ["a.png", "b.png"])
    hashes = []
    for labels in ("cat", "dog"), ("dog", "cat"):
        lines = "".join(f"{name}.png,x,{label}\n" for name, label in zip("ab", labels, strict=True))
        (tmp_path / "metadata.csv").write_text(f"file_name,text,label\n{lines}")
        data = load(tmp_path)
        hashes.append((data.sha256, data.classes.sha256))
    assert hashes[0][0] == hashes[1][0]
    assert hashes[0][1] != hashes[1][1]


@pytest.mark.parametrize("layout", ["beside each other", "a single one"])
def test_a_model_of_labels_is_refused_without_them(refused, composed, tiny, tmp_path, layout):
    paint(tmp_path / "data", FOLDERS[layout][0])
    config = composed(*tiny(*WORDS, "data.path=pictures"))
    here = [f"data.path={tmp_path}/data", "data.batch_size=1", "trainer.max_images=1"]
    error = refused(*WORDS, config=with_values(config, *here))
    assert error.exit_code == 2
    assert error.key == "model.conditioner"


@pytest.fixture(scope="module")
def animals(train_tiny, tmp_path_factory):
    """A folder with 24 pictures of three classes in data/, and a run that was trained on them."""
    folder = tmp_path_factory.mktemp("animals")
    paint(folder / "data", [f"{kind}/{i}.png" for kind in ("cat", "dog", "fox") for i in range(8)])
    result = train_tiny(folder / "run", *WORDS, f"data.path={folder}/data")
    assert result.code == 0, result.err
    assert "3 classes: 0 cat, 1 dog, 2 fox." in result.out
    return folder


@pytest.fixture
def config(composed, tiny, animals):
    """The configuration of that run, before data and model have filled it in."""
    config = composed(*tiny(*WORDS, "data.path=pictures"))
    return with_values(config, f"data.path={animals}/data")


def saved(folder):
    return yaml.safe_load((folder / "run" / "config.yaml").read_text())


def test_another_number_of_classes_than_the_datas_is_refused(refused, config):
    error = refused(*WORDS, config=with_values(config, "model.conditioner.num_classes=48"))
    assert error.exit_code == 2
    assert "model.conditioner.num_classes=48" in str(error)


def test_classes_travel_with_the_run(animals):
    """A loaded model knows them without its data, and labels are asked for by name or number."""
    node = saved(animals)["model"]["conditioner"]
    assert node["num_classes"] == 3
    assert node["class_names"] == ["cat", "dog", "fox"]
    checkpoint = CheckpointFolder(find_checkpoint(animals / "run"))
    loaded = load_checkpoint(checkpoint, ema=False, device="cpu", allow=[], autoencoder=None)
    asked = SimpleNamespace(prompt=[], negative_prompt="", guidance_scale=3.0, seed=0, num_images=1)

    def labels(label):
        asked.label = label
        return [each.label for each in build_requests(asked, loaded.model.conditioner)]

    assert labels(2) == labels("fox") == [2]
    assert labels(["fox", 0]) == [2, 0]
    for wrong in (3, -1, "wolf"):
        with pytest.raises(UserError) as refused:
            labels(wrong)
        assert refused.value.key == "label"
        assert "2 fox" in str(refused.value), wrong


def test_a_class_that_was_not_trained_is_told(animals, here, tmp_path):
    run = shutil.copytree(animals / "run", tmp_path / "run")
    record = json.loads((run / "data.json").read_text())
    assert record["untrained"] == []
    (run / "data.json").write_text(json.dumps(record | {"untrained": [2]}))
    asked = ["label=[cat,fox]", "num_images=1", "steps=2", "ema=false", f"output={tmp_path}/out"]
    result = here("sdtrain-sample", f"checkpoint={run}", *asked)
    assert result.code == 0, result.err
    assert "fox" in result.err
    assert "cat" not in result.err


def test_a_run_with_classes_goes_on(animals, planned, built, config):
    before = saved(animals)
    plan = planned(*WORDS, config=with_values(config, "trainer.max_images=16"))
    new = yaml.safe_load(saved_config(plan, built(plan)))
    assert new["model"]["conditioner"]["class_names"] == ["cat", "dog", "fox"]
    assert may_resume(before, new)
    # A configuration that is not built yet leaves the classes to the data.
    unbuilt = json.loads(json.dumps(before))
    for key in FILLED_FROM_DATA:
        unbuilt["model"]["conditioner"].pop(key.rpartition(".")[2])
    assert may_resume(before, unbuilt)
    unbuilt["model"]["conditioner"]["num_classes"] = 4
    assert not may_resume(before, unbuilt)
