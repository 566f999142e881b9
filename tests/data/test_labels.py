"""Class labels come from subfolders or a column, and a model of labels is refused without them."""

import json

import pytest
import yaml
from PIL import Image

from sdtrain.config.precheck import precheck_config
from sdtrain.data.images import Images
from sdtrain.runs.resume import FILLED_FROM_DATA, may_resume

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
def test_a_model_of_labels_is_refused_without_them(here, tiny, tmp_path, layout):
    paint(tmp_path / "data", FOLDERS[layout][0] * 1)
    words = tiny(*WORDS, f"data.path={tmp_path}/data", "data.batch_size=1")
    result = here("sdtrain", *words, f"hydra.run.dir={tmp_path}/run")
    assert result.code == 2 and "model.conditioner" in result.paragraph, result.err


def test_classes_travel_with_the_run(here, tiny, tmp_path):
    files = [f"{kind}/{i}.png" for kind in ("cat", "dog", "fox") for i in range(8)]
    paint(tmp_path / "data", files)
    words = tiny(*WORDS, f"data.path={tmp_path}/data")
    run = tmp_path / "run"
    wrong = here("sdtrain", *words, "model.conditioner.num_classes=48", f"hydra.run.dir={run}")
    assert wrong.code == 2 and "model.conditioner.num_classes=48" in wrong.paragraph
    result = here("sdtrain", *words, f"hydra.run.dir={run}")
    assert result.code == 0, result.err
    assert "3 classes: 0 cat, 1 dog, 2 fox." in result.out
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["model"]["conditioner"]["num_classes"] == 3
    assert saved["model"]["conditioner"]["class_names"] == ["cat", "dog", "fox"]
    drawn = []
    for label, code in {"2": 0, "fox": 0, "3": 2, "-1": 2, "wolf": 2, "[fox,0]": 0}.items():
        out = tmp_path / f"out{label}"
        asked = [f"label={label}", "num_images=1", "steps=2", "ema=false", f"output={out}"]
        result = here("sdtrain-sample", f"checkpoint={run}", *asked)
        assert result.code == code, result.err
        assert code == 0 or "label" in result.paragraph and "2 fox" in result.paragraph
        drawn.append(sorted(file.read_bytes() for file in out.glob("0*.png")))
    assert drawn[0] == drawn[1] and len(drawn[-1]) == 2 and drawn[0][0] in drawn[-1]
    record = json.loads((run / "data.json").read_text())
    assert record["untrained"] == []
    (run / "data.json").write_text(json.dumps(record | {"untrained": [2]}))
    asked = ["label=[cat,fox]", "num_images=1", "steps=2", "ema=false", f"output={tmp_path}/none"]
    result = here("sdtrain-sample", f"checkpoint={run}", *asked)
    assert result.code == 0 and "fox" in result.err and "cat" not in result.err
    # A configuration that is not built yet leaves the classes to the data.
    unbuilt = json.loads(json.dumps(saved))
    for key in FILLED_FROM_DATA:
        unbuilt["model"]["conditioner"].pop(key.rpartition(".")[2])
    assert may_resume(saved, unbuilt)
    unbuilt["model"]["conditioner"]["num_classes"] = 4
    assert not may_resume(saved, unbuilt)
    again = here("sdtrain", *words, "trainer.max_images=16", "resume=must", f"hydra.run.dir={run}")
    assert again.code == 0, again.err
