"""A run that is refused before anything is trained leaves the disk as it was: no folder of its own,
and the user's folders, empty ones too.
"""

import pytest
import torch
from PIL import Image

IMAGES = [
    "data=images",
    "data.path=pictures",
    "data.image_size=16",
    "data.batch_size=4",
    "data.num_workers=0",
]
PIXELS = [*IMAGES, "model/autoencoder=pixels"]

REFUSED = {
    "no such folder": (3, ["data=images", "data.path=nowhere"], "data.path"),
    "no folder named": (2, ["data=images"], "data.path"),
    "batch": (3, [*PIXELS, "data.batch_size=64"], "data.batch_size"),
    "batch, before a first stage": (3, [*IMAGES, "data.batch_size=64"], "data.batch_size"),
    "labels": (2, [*PIXELS, "model/conditioner=class_label"], "model.conditioner"),
    "labels, before a first stage": (
        2,
        [*IMAGES, "model/conditioner=class_label"],
        "model.conditioner",
    ),
    "network": (2, ["model.unet.block_channels=[]"], "model.unet"),
    "network, before a first stage": (2, [*IMAGES, "model.unet.block_channels=[]"], "model.unet"),
    "autoencoder": (2, ["model.autoencoder.path=nowhere"], "model.autoencoder.path"),
    "device": (2, ["trainer.accelerator=gpu"], "trainer"),
    "resume": (2, ["resume=must"], "resume"),
}

PLACES = {
    "deep in new folders": ["hydra.run.dir=new/of/mine"],
    "in a folder that is there": ["hydra.run.dir=there/run"],
    "in an empty folder": ["hydra.run.dir=there"],
    "here": ["hydra.run.dir=."],
    "in a folder with a file": ["hydra.run.dir=full"],
}


def contents(folder):
    return sorted((path.relative_to(folder), path.is_dir()) for path in folder.rglob("*"))


@pytest.fixture
def home(tmp_path):
    for name in ("pictures", "there", "full"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "notes").touch()
    for i in range(8):
        Image.new("RGB", (20, 20), (i * 5, 20, 90)).save(tmp_path / "pictures" / f"{i}.png")
        (tmp_path / "pictures" / f"{i}.txt").write_text("a colour")
    return tmp_path


@pytest.mark.parametrize("why", REFUSED)
def test_whatever_is_refused(train_tiny, home, monkeypatch, why):
    """The run's folder, which Hydra has made, is empty again, and nothing lies elsewhere."""
    if why == "device" and torch.cuda.is_available():
        pytest.skip("there is one")
    code, words, key = REFUSED[why]
    before = contents(home)
    monkeypatch.chdir(home)
    result = train_tiny(home / "new", *words)
    assert result.code == code and key in result.paragraph, result.err
    (home / "new").rmdir()
    assert contents(home) == before


def test_the_command_removes_the_folder_that_hydra_has_made(here, tiny, home):
    """Named by its time. Refused once the data is read, before a first stage."""
    before = contents(home)
    result = here("sdtrain", *tiny(*IMAGES, "data.batch_size=64"), cwd=home)
    assert result.code == 3, result.err
    assert contents(home) == before


@pytest.mark.parametrize("place", PLACES)
def test_wherever_it_would_lie(here, home, place):
    before = contents(home)
    result = here("sdtrain", "logger=none", "steps=0", *PLACES[place], cwd=home)
    assert result.code == 2, result.err
    assert contents(home) == before


@pytest.mark.parametrize("word", ["hydra.run.dir=", "hydra.run.dir=''"])
def test_an_empty_folder_is_refused(here, home, word):
    before = contents(home)
    result = here("sdtrain", word, cwd=home)
    assert result.code == 2 and "hydra.run.dir" in result.paragraph
    assert contents(home) == before
