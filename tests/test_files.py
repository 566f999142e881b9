"""A file or a folder is written whole or not at all, whatever happens to the writer."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sdtrain.files import atomic_folder, remove_leftovers, write_text
from sdtrain.runs.lock import hold_lock
from sdtrain.runs.manifest import list_checkpoints


def write_folder(folder: Path, text: str) -> None:
    with atomic_folder(folder) as beside:
        (beside / "file").write_text(text)


def contents(folder: Path) -> dict[str, str]:
    """Every file below the folder, hidden ones too."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


@pytest.fixture
def second_rename(monkeypatch):
    """Makes the second call of Path.rename from now on raise what it is given."""
    rename = Path.rename

    def fails_with(error: BaseException) -> None:
        calls = []

        def counted(path: Path, target: Path) -> Path:
            calls.append(path)
            if len(calls) == 2:
                raise error
            return rename(path, target)

        monkeypatch.setattr(Path, "rename", counted)

    return fails_with


def test_a_folder_is_replaced(tmp_path):
    write_folder(tmp_path / "000064", "first")
    write_folder(tmp_path / "000064", "second")
    assert contents(tmp_path) == {"000064/file": "second"}


@pytest.fixture
def umask():
    """Sets it, until the test has ended."""
    before = os.umask(0)
    yield os.umask
    os.umask(before)


def modes(folder: Path) -> dict[str, str]:
    """Of every file and folder below."""
    return {path.name: f"{path.stat().st_mode & 0o777:o}" for path in folder.rglob("*")}


@pytest.mark.parametrize(("mask", "file", "inner"), [(0o22, "644", "755"), (0o77, "600", "700")])
def test_who_may_read_is_what_the_process_says(tmp_path, umask, mask, file, inner):
    """Also where a library has another opinion."""
    umask(mask)
    write_text(tmp_path / "status.json", "")
    with atomic_folder(tmp_path / "000064") as beside:
        save_file({"a": torch.zeros(1)}, beside / "model.safetensors")
        (beside / "config.yaml").write_text("")
    assert modes(tmp_path) == {
        "status.json": file,
        "000064": inner,
        "model.safetensors": file,
        "config.yaml": file,
    }


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_a_folder_that_cannot_be_replaced_is_as_it_was(tmp_path, second_rename, error):
    write_folder(tmp_path / "000064", "first")
    second_rename(error)
    with pytest.raises(type(error)):
        write_folder(tmp_path / "000064", "second")
    assert contents(tmp_path) == {"000064/file": "first"}


def test_a_folder_whose_writer_died_between_the_renames_comes_back(tmp_path):
    write_folder(tmp_path / ".000064.old.tmp", "first")
    write_folder(tmp_path / ".000064.4711.tmp", "second")
    remove_leftovers(tmp_path)
    assert contents(tmp_path) == {"000064/file": "first"}


def test_it_comes_back_before_a_run_looks_for_its_newest_checkpoint(tmp_path):
    write_folder(tmp_path / "checkpoints/.000064.old.tmp", "first")
    with hold_lock(tmp_path, pytest.fail):
        assert [path.name for path in list_checkpoints(tmp_path)] == ["000064"]


def test_an_old_folder_that_was_replaced_is_removed(tmp_path):
    write_folder(tmp_path / ".000064.old.tmp", "first")
    write_folder(tmp_path / "000064", "second")
    remove_leftovers(tmp_path)
    assert contents(tmp_path) == {"000064/file": "second"}


def test_left_overs_are_removed_and_nothing_else(tmp_path):
    write_text(tmp_path / ".status.json.4711.tmp", "half")
    write_folder(tmp_path / ".000064.4711.tmp", "half")
    write_text(tmp_path / ".lock", "")
    write_text(tmp_path / "notes.tmp", "the user's")
    remove_leftovers(tmp_path)
    assert contents(tmp_path) == {".lock": "", "notes.tmp": "the user's"}


def test_a_text_that_cannot_be_written_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "status.json"
    write_text(path, "first")
    with pytest.raises(TypeError):
        write_text(path, b"second")
    assert contents(tmp_path) == {"status.json": "first"}


def test_a_file_name_of_any_bytes_can_be_written_down(tmp_path):
    path = tmp_path / "status.json"
    write_text(path, json.dumps("x\udce9", ensure_ascii=False))
    assert json.loads(path.read_text(encoding="utf-8")) == "x\udce9"
