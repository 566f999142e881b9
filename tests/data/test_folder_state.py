"""A folder that has changed is noticed by the times of its folders, or of its files if these are
few.
"""

import json
import os
import shutil
from dataclasses import asdict

import pytest

from sdtrain.data import folder_state
from sdtrain.data.folder_state import CLOCK_STEP, FolderState, now
from sdtrain.data.listing import list_folder


def fill(folder):
    for name in ("a.png", "a.txt", "sub/b.png", "sub/b.txt", "sub/deep/c.png", "metadata.jsonl"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def state_of(folder, later=0):
    """later: how much later than now it is listed, in nanoseconds."""
    folder = str(folder)
    state = FolderState.of(folder, list_folder(folder), ["metadata.jsonl"], now() + later)
    return FolderState(**json.loads(json.dumps(asdict(state))))


def link_elsewhere(folder):
    (folder / "linked").unlink()
    shutil.copytree(folder.parent / "elsewhere", folder.parent / "other")
    (folder / "linked").symlink_to(folder.parent / "other")


NAMES_CHANGE = {
    "added": lambda folder: (folder / "sub/deep/new.png").write_text("new"),
    "removed": lambda folder: (folder / "sub/b.png").unlink(),
    "renamed": lambda folder: (folder / "a.png").rename(folder / "z.png"),
    "a caption added": lambda folder: (folder / "sub/deep/c.txt").write_text("new"),
    "a folder added": lambda folder: fill(folder / "new"),
    "behind a link": lambda folder: (folder / "linked/new.png").write_text("new"),
    "a link that leads elsewhere": link_elsewhere,
    "the metadata": lambda folder: (folder / "metadata.jsonl").write_text("other"),
    "the metadata removed": lambda folder: (folder / "metadata.jsonl").unlink(),
    "all of it": lambda folder: shutil.rmtree(folder),
}
CONTENTS_CHANGE = {
    "a picture": lambda folder: (folder / "sub/b.png").write_text("changed"),
    "a picture of the same size": lambda folder: os.utime(folder / "a.png", (1, 1)),
    "a caption": lambda folder: (folder / "a.txt").write_text("other"),
}


@pytest.fixture
def folder(tmp_path):
    fill(tmp_path / "elsewhere")
    folder = fill(tmp_path / "pictures")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    return folder


@pytest.mark.parametrize("few", [True, False])
def test_a_changed_folder_is_noticed(few, tmp_path, monkeypatch, folder):
    if not few:
        monkeypatch.setattr(folder_state, "FEW_FILES", 2)
    kept = tmp_path / "kept"
    shutil.copytree(tmp_path / "elsewhere", kept)
    for name, change in NAMES_CHANGE.items():
        for made in ("pictures", "elsewhere", "other"):
            shutil.rmtree(tmp_path / made, ignore_errors=True)
        shutil.copytree(kept, tmp_path / "elsewhere")
        shutil.copytree(kept, folder)
        (folder / "linked").symlink_to(tmp_path / "elsewhere")
        state = state_of(folder, later=2 * CLOCK_STEP)
        assert state.holds(str(folder)), name
        change(folder)
        assert not state.holds(str(folder)), name


def test_changed_contents_are_noticed_where_files_are_few(folder, monkeypatch):
    for name, change in CONTENTS_CHANGE.items():
        state = state_of(folder)
        assert state.holds(str(folder)), name
        change(folder)
        assert not state.holds(str(folder)), name
    monkeypatch.setattr(folder_state, "FEW_FILES", 2)
    state = state_of(folder, later=2 * CLOCK_STEP)
    (folder / "a.txt").write_text("another")
    assert state.holds(str(folder))  # it is compared when it is read


def test_a_folder_that_was_just_changed_is_listed_again(folder, monkeypatch):
    """A name that is added within one step of the clock would not be seen."""
    monkeypatch.setattr(folder_state, "FEW_FILES", 2)
    assert not state_of(folder).holds(str(folder))
    assert state_of(folder, later=2 * CLOCK_STEP).holds(str(folder))
