"""The checkpoint folder: whole or not there; a damaged one is passed over, and never believed."""

import errno
import hashlib
import json
import os
import resource
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from sdtrain.checkpoints import damage, find_checkpoint, newest_whole, published, read_trainer, read_weights, write_checkpoint
from sdtrain.errors import StorageError, UserError

FILES = {"model.safetensors", "ema.safetensors", "trainer.pt", "config.yaml"}


def write(run, seen, numbers=1000):
    folder = run / "checkpoints" / f"{seen:012d}"
    tensors = {"a": torch.full((numbers,), float(seen)), "b": torch.arange(3)}
    write_checkpoint(folder, tensors, {"a": tensors["a"] + 1}, {"steps": seen, "moments": torch.ones(2 * numbers)}, f"seed: {seen}\n")
    return folder


@pytest.fixture
def run(tmp_path):
    for seen in (16, 32, 48):
        write(tmp_path / "run", seen)
    return tmp_path / "run"


def test_what_is_written_is_read_back(run):
    folder = run / "checkpoints" / "000000000048"
    assert torch.equal(read_weights(folder, "model")["a"], torch.full((1000,), 48.0))
    assert torch.equal(read_weights(folder, "ema")["a"], torch.full((1000,), 49.0))
    assert read_trainer(folder)["steps"] == 48 and (folder / "config.yaml").read_text() == "seed: 48\n"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest.keys() == FILES and {path.name for path in folder.iterdir()} == FILES | {"manifest.json"}
    for name, entry in manifest.items():
        assert entry == {"bytes": (folder / name).stat().st_size, "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest()}
    assert newest_whole(run) == (folder, []) and not list(run.rglob("*.tmp"))


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(("name", "harm", "reason"), [
    ("model.safetensors", truncate, "model.safetensors"), ("model.safetensors", flip, "model.safetensors"), ("trainer.pt", flip, "trainer.pt"),
    ("config.yaml", flip, "config.yaml"), ("ema.safetensors", os.unlink, "ema.safetensors"), ("manifest.json", os.unlink, "manifest.json"),
    ("manifest.json", truncate, "manifest.json"), ("manifest.json", lambda path: path.write_text("[]"), "manifest.json"),
    ("manifest.json", lambda path: path.write_text("{}"), "manifest.json"),
])
def test_a_damaged_one_is_passed_over_and_refused_by_name(run, name, harm, reason):
    newest, older = run / "checkpoints" / "000000000048", run / "checkpoints" / "000000000032"
    assert damage(newest) is None
    harm(newest / name)
    assert reason in damage(newest)
    folder, passed_over = newest_whole(run)
    assert folder == older and len(passed_over) == 1 and str(newest) in passed_over[0] and reason in passed_over[0]
    assert find_checkpoint(run) == older and find_checkpoint(older) == older
    with pytest.raises(UserError, match="checkpoint=.*000000000048.*" + reason):
        find_checkpoint(newest)


def test_where_none_is_whole_it_says_why(run, tmp_path):
    for folder in published(run):
        flip(folder / "model.safetensors")
    assert newest_whole(run)[0] is None and len(newest_whole(run)[1]) == 3
    with pytest.raises(UserError, match=r"model\.safetensors"):
        find_checkpoint(run)
    with pytest.raises(UserError, match="no run of sdtrain"):
        find_checkpoint(tmp_path)


def test_a_checkpoint_named_from_inside_its_run_belongs_to_that_run(run, monkeypatch):
    for place, word in ((run / "checkpoints", "000000000048"), (run / "checkpoints" / "000000000048", "."), (run, "."), (run.parent, "run")):
        monkeypatch.chdir(place)
        assert find_checkpoint(Path(word)).parent.parent.resolve() == run


@contextmanager
def files_at_most(size):
    """No file may grow beyond `size` bytes: what a full disk looks like to those who write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def no_fsync():
    def refuse(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        yield


@pytest.mark.parametrize("refusal", [no_fsync(), files_at_most(2000), files_at_most(6000)], ids=["fsync", "weights", "trainer"])
def test_a_disk_that_refuses_leaves_the_older_ones_whole(run, refusal):
    with refusal, pytest.raises(StorageError, match=r"hydra\.run\.dir"):
        write(run, 64)
    assert [folder.name for folder in published(run)] == ["000000000016", "000000000032", "000000000048"]
    assert all(damage(folder) is None for folder in published(run))
    assert not [path for path in (run / "checkpoints").iterdir() if path not in published(run)]
    write(run, 64)
    assert newest_whole(run)[0].name == "000000000064"


def test_a_refused_rewrite_keeps_the_one_that_was_there(run):
    with no_fsync(), pytest.raises(StorageError):
        write(run, 48)
    assert newest_whole(run) == (run / "checkpoints" / "000000000048", [])
    write(run, 48, numbers=7)
    assert len(read_weights(run / "checkpoints" / "000000000048", "model")["a"]) == 7 and newest_whole(run)[1] == []


def test_a_full_disk_ends_a_run_with_5_and_the_older_checkpoint_stays(here, tiny, tmp_path, tiny_run):
    run = tmp_path / "run"
    shutil.copytree(published(tiny_run)[0], run / "checkpoints" / published(tiny_run)[0].name)
    with files_at_most(400_000):  # less than the weights
        result = here("sdtrain", *tiny("resume=must"), f"hydra.run.dir={run}")
    assert result.code == 5 and "hydra.run.dir" in result.paragraph, result.err
    assert json.loads((run / "status.json").read_text())["exit_code"] == 5
    assert newest_whole(run) == (published(run)[0], []) and len(published(run)) == 1


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_nothing_is_unpickled(run, tiny_run, tmp_path):
    assert read_trainer(published(tiny_run)[-1])["DataModule"] == {"images_seen": 64}
    folder = published(run)[-1]
    torch.save({"steps": 48, "callbacks": Touch(str(tmp_path / "touched"))}, folder / "trainer.pt")
    with pytest.raises(Exception, match="weights_only|Weights only"):
        read_trainer(folder)
    assert not (tmp_path / "touched").exists()
    torch.load(folder / "trainer.pt", weights_only=False)  # the twin: so it would have been
    assert (tmp_path / "touched").exists()


def test_a_run_keeps_the_newest_and_sweeps_what_a_dead_one_left(here, tiny, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints" / ".000000000016.1.tmp").mkdir(parents=True)
    assert here("sdtrain", *tiny("checkpoint.every=8", "checkpoint.keep=3"), f"hydra.run.dir={run}").code == 0
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["000000000048", "000000000056", "000000000064"]


def test_resume_goes_on_from_the_newest_whole_one_and_names_the_damaged(here, tiny, tiny_run, saved, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    flip(published(run)[-1] / "model.safetensors")
    result = here("sdtrain", *tiny("resume=must"), f"hydra.run.dir={run}")
    assert result.code == 0, result.err
    assert "passed over" in result.out and "model.safetensors" in result.out
    straight, resumed = saved(tiny_run), saved(run)
    assert damage(published(run)[-1]) is None and all(torch.equal(value, resumed[key]) for key, value in straight.items())
