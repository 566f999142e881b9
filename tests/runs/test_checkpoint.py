"""The checkpoint folder: whole or not there; a damaged one is passed over, and never believed."""

import errno
import hashlib
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from reading import BARE, newest, same, status

from sdtrain.errors import DivergedError, StorageError, UserError
from sdtrain.runs.checkpoint import read_trainer, read_weights, write_checkpoint
from sdtrain.runs.manifest import find_checkpoint, find_damage, list_checkpoints, newest_intact
from sdtrain.training.checkpoint_io import FolderIO

FILES = {"model.safetensors", "ema.safetensors", "trainer.pt", "config.yaml"}


def write(run, seen, numbers=1000):
    folder = run / "checkpoints" / f"{seen:012d}"
    weights = {"a": torch.full((numbers,), float(seen)), "b": torch.arange(3)}
    average = {"a": weights["a"] + 1}
    state = {"steps": seen, "moments": torch.ones(2 * numbers)}
    write_checkpoint(folder, weights, average, state, f"seed: {seen}\n")
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
    assert read_trainer(folder)["steps"] == 48
    assert (folder / "config.yaml").read_text() == "seed: 48\n"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest.keys() == FILES
    assert {path.name for path in folder.iterdir()} == FILES | {"manifest.json"}
    for name, entry in manifest.items():
        content = (folder / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert newest_intact(run) == (folder, []) and not list(run.rglob("*.tmp"))


def names(run) -> list[str]:
    return [folder.name for folder in list_checkpoints(run)]


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def zero(path):
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize(
    ("name", "harm", "reason"),
    [
        ("model.safetensors", zero, "model.safetensors"),
        ("manifest.json", zero, "manifest.json"),
        ("model.safetensors", truncate, "model.safetensors"),
        ("model.safetensors", flip, "model.safetensors"),
        ("trainer.pt", flip, "trainer.pt"),
        ("config.yaml", flip, "config.yaml"),
        ("ema.safetensors", os.unlink, "ema.safetensors"),
        ("manifest.json", os.unlink, "manifest.json"),
        ("manifest.json", truncate, "manifest.json"),
        ("manifest.json", lambda path: path.write_text("[]"), "manifest.json"),
        ("manifest.json", lambda path: path.write_text("{}"), "manifest.json"),
    ],
)
def test_a_damaged_one_is_passed_over_and_refused_by_name(run, name, harm, reason):
    harmed = run / "checkpoints" / "000000000048"
    older = run / "checkpoints" / "000000000032"
    assert find_damage(harmed) is None
    harm(harmed / name)
    assert reason in find_damage(harmed)
    folder, (line,) = newest_intact(run)
    assert folder == older and str(harmed) in line and reason in line
    assert find_checkpoint(run) == older and find_checkpoint(older) == older
    with pytest.raises(UserError, match=reason) as caught:
        find_checkpoint(harmed)
    assert caught.value.key == "checkpoint" and caught.value.value == str(harmed)


def test_where_none_is_whole_it_says_why(run, tmp_path):
    for folder in list_checkpoints(run):
        flip(folder / "model.safetensors")
    assert newest_intact(run)[0] is None and len(newest_intact(run)[1]) == 3
    with pytest.raises(UserError, match=r"model\.safetensors"):
        find_checkpoint(run)
    with pytest.raises(UserError, match="not a run of sdtrain"):
        find_checkpoint(tmp_path)


def test_a_checkpoint_named_from_inside_its_run_belongs_to_that_run(run, monkeypatch):
    folders = run / "checkpoints"
    for place, word in (
        (folders, "000000000048"),
        (folders / "000000000048", "."),
        (run, "."),
        (run.parent, "run"),
    ):
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


@pytest.mark.parametrize(
    "refusal",
    [no_fsync(), files_at_most(2000), files_at_most(6000)],
    ids=["fsync", "weights", "trainer"],
)
def test_a_disk_that_refuses_leaves_the_older_ones_whole(run, refusal):
    with refusal, pytest.raises(StorageError, match=r"hydra\.run\.dir"):
        write(run, 64)
    assert names(run) == ["000000000016", "000000000032", "000000000048"]
    assert all(find_damage(folder) is None for folder in list_checkpoints(run))
    assert not [
        path for path in (run / "checkpoints").iterdir() if path not in list_checkpoints(run)
    ]
    write(run, 64)
    assert newest_intact(run)[0].name == "000000000064"


def test_a_refused_rewrite_keeps_the_one_that_was_there(run):
    with no_fsync(), pytest.raises(StorageError):
        write(run, 48)
    assert newest_intact(run) == (run / "checkpoints" / "000000000048", [])
    folder = write(run, 48, numbers=7)
    assert len(read_weights(folder, "model")["a"]) == 7 and newest_intact(run)[1] == []


@pytest.mark.slow
@pytest.mark.parametrize("allowed", [9, 1])
def test_a_full_disk_ends_a_run_with_5_and_the_older_checkpoint_stays(
    train_tiny, tmp_path, tiny_run, allowed
):
    """To its end, where the last save must hold, or until too many in a row have failed, seen when
    the next begins."""
    run = tmp_path / "run"
    first = list_checkpoints(tiny_run)[0]
    shutil.copytree(first, run / "checkpoints" / first.name)
    words = [
        "resume=must",
        "trainer.max_images=96",
        "checkpoint.every=8",
        f"checkpoint.max_failed_saves={allowed}",
    ]
    with files_at_most(400_000):  # less than the weights
        result = train_tiny(run, *words)
    assert result.code == 5 and "hydra.run.dir" in result.err, result.err
    assert f"failed saves in a row: 1 of at most {allowed}" in result.err
    # Two have failed, and a third begins.
    reached = 96 if allowed == 9 else int(first.name) + 3 * 8
    assert status(run)["exit_code"] == 5 and status(run)["images_seen"] == reached
    assert names(run) == [first.name] and newest_intact(run)[1] == []


def saver(**changed):
    """(FolderIO, the lines that it reports)."""
    reported = []
    settings = {"config": "seed: 0\n", "keep": 2, "max_failed_saves": 1}
    return FolderIO(**settings | {"warn": reported.append} | changed), reported


def lightnings(value, run):
    """(Lightning's checkpoint dictionary, the folder for it)."""
    own, average = ({"a": torch.full((300, 300), sign * float(value))} for sign in (1, -1))
    state = {
        "state_dict": own,
        "callbacks": {"ema": {"steps": value, "weights": average}},
        "moments": [torch.full((9,), float(value))],
    }
    return state, run / "checkpoints" / f"{value:012d}"


@pytest.mark.parametrize(
    "memory", [float("inf"), 0.0], ids=["a copy in the background", "no room for a copy"]
)
def test_what_training_does_meanwhile_is_not_in_the_checkpoint(tmp_path, memory):
    io, _ = saver(memory=lambda: memory)
    for value in (8, 16, 24):
        state, folder = lightnings(value, tmp_path)
        io.save_checkpoint(state, folder)
        for tensor in (
            state["state_dict"]["a"],
            state["callbacks"]["ema"]["weights"]["a"],
            state["moments"][0],
        ):
            tensor.fill_(math.nan)  # at once, while the thread writes
    io.wait(last=True)
    assert names(tmp_path) == ["000000000016", "000000000024"]
    for folder in list_checkpoints(tmp_path):
        assert find_damage(folder) is None
        value = int(folder.name)
        read = io.load_checkpoint(folder)
        assert read["state_dict"]["a"].eq(value).all() and read["moments"][0].eq(value).all()
        average = read["callbacks"]["ema"]
        assert average["weights"]["a"].eq(-value).all() and average["steps"] == value


@pytest.mark.slow
def test_failed_saves_are_tried_again_reported_and_bounded(tmp_path):
    io, reported = saver()
    io.save_checkpoint(*lightnings(8, tmp_path))
    io.wait()
    with files_at_most(2000):
        io.save_checkpoint(*lightnings(16, tmp_path))
        io.wait()
    (line,) = reported
    assert "1 of at most 1" in line and "000000000016" in line
    io.save_checkpoint(*lightnings(24, tmp_path))  # the disk has room again: the count begins anew
    io.wait(last=True)
    assert io.failures == 0 and names(tmp_path) == ["000000000008", "000000000024"]
    with files_at_most(2000), pytest.raises(StorageError):
        for value in (32, 40, 48):
            io.save_checkpoint(*lightnings(value, tmp_path))
    last, _ = saver(max_failed_saves=100)
    with files_at_most(2000), pytest.raises(StorageError):
        last.save_checkpoint(*lightnings(56, tmp_path))
        last.wait(last=True)  # the last one must hold, whatever is allowed
    assert names(tmp_path) == ["000000000008", "000000000024"]


def test_what_is_no_fault_of_the_disk_is_not_blamed_on_it(tmp_path):
    """And there is no second attempt, which would end like the first."""
    io, reported = saver(memory=lambda: 0.0)
    state, folder = lightnings(8, tmp_path)
    state["state_dict"]["nowhere"] = torch.arange(3, device="meta")
    with pytest.raises(NotImplementedError, match="meta"):
        io.save_checkpoint(state, folder)
    assert not reported and not list(folder.parent.iterdir())


@pytest.mark.parametrize("which", ["weights", "average"])
def test_weights_that_are_not_finite_never_replace_good_ones(tmp_path, which):
    io, _ = saver()
    state, folder = lightnings(8, tmp_path)
    io.save_checkpoint(state, folder)
    state, folder = lightnings(16, tmp_path)
    average = state["callbacks"]["ema"]["weights"]
    tensors = state["state_dict"] if which == "weights" else average
    tensors["a"][7, 7] = math.inf
    with pytest.raises(DivergedError, match="not finite at 000000000016") as caught:
        io.save_checkpoint(state, folder)
    assert caught.value.exit_code == 4
    io.wait(last=True)
    assert names(tmp_path) == ["000000000008"]


def test_free_space_is_looked_at_before_anything_is_written(run):
    """No disk has room for this one, which has no memory either: a tensor of one number, spread
    out."""
    huge = {"a": torch.zeros(1).expand(2**50)}
    with pytest.raises(StorageError, match="MiB are free") as caught:
        write_checkpoint(run / "checkpoints" / "000000000064", huge, None, {}, "")
    assert caught.value.key == "hydra.run.dir" and caught.value.exit_code == 5
    assert not list((run / "checkpoints").glob(".*"))
    assert newest_intact(run)[0].name == "000000000048"


WRITER = """
import os, sys, torch
from pathlib import Path
from sdtrain.runs.checkpoint import write_checkpoint
assert not {"lightning", "hydra", "diffusers"} & set(sys.modules)

def save_for_ever(run):
    value = 0
    while True:
        value += 1
        tensors = {str(i): torch.full((40000,), float(value)) for i in range(6)}
        folder = run / "checkpoints" / f"{value:012d}"
        write_checkpoint(folder, tensors, tensors, {"steps": value}, f"seed: {value}\\n")
        # In one write: print makes two where Python does not buffer, and a kill falls between.
        os.write(1, f"{value}\\n".encode())

for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        print(os.getpid(), flush=True)
        save_for_ever(Path(line.strip()))
    os.waitpid(pid, 0)
    print("ended", flush=True)
"""
"""A process of its own for each folder that it is told."""


@pytest.mark.slow
def test_killed_at_any_moment_of_a_save_a_whole_one_is_found(tmp_path):
    """The writer prints each checkpoint that it has published; killed at a random moment, that one
    or a newer is whole."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    # Another file system: nothing is renamed across.
    environment = os.environ | {"TMPDIR": "/dev/shm"}
    with subprocess.Popen([sys.executable, "-c", WRITER], env=environment, **pipes) as writer:
        for attempt in range(25):
            run = tmp_path / str(attempt)
            writer.stdin.write(f"{run}\n")
            writer.stdin.flush()
            pid = int(writer.stdout.readline())
            assert int(writer.stdout.readline()) == 1
            time.sleep(random.Random(attempt).uniform(0.0, 0.15))
            os.kill(pid, signal.SIGKILL)
            printed = 1
            while (line := writer.stdout.readline()) != "ended\n":
                printed = int(line)
            found, passed_over = newest_intact(run)
            assert int(found.name) in (printed, printed + 1), attempt
            assert passed_over == [], attempt
            assert read_weights(found, "model")["3"].eq(int(found.name)).all(), attempt
        writer.stdin.close()


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_nothing_is_unpickled(run, tiny_run, tmp_path):
    assert read_trainer(list_checkpoints(tiny_run)[-1])["DataModule"] == {"images_seen": 64}
    folder = list_checkpoints(run)[-1]
    torch.save({"steps": 48, "callbacks": Touch(str(tmp_path / "touched"))}, folder / "trainer.pt")
    with pytest.raises(Exception, match="weights_only|Weights only"):
        read_trainer(folder)
    assert not (tmp_path / "touched").exists()
    torch.load(folder / "trainer.pt", weights_only=False)  # the twin: so it would have been
    assert (tmp_path / "touched").exists()


def test_a_run_keeps_the_newest_and_removes_what_a_dead_one_left(train_tiny, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints" / ".000000000016.1.tmp").mkdir(parents=True)
    words = [*BARE, "trainer.max_images=32", "checkpoint.every=8", "checkpoint.keep=3"]
    assert train_tiny(run, *words).code == 0
    left = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert left == ["000000000016", "000000000024", "000000000032"]


def test_resume_goes_on_from_the_newest_whole_one_and_names_the_damaged(
    train_tiny, tiny_run, saved, tmp_path
):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    harmed = newest(run)
    flip(harmed / "model.safetensors")
    result = train_tiny(run, "resume=must")
    assert result.code == 0, result.err
    assert "is skipped" in result.out and "model.safetensors" in result.out
    assert (harmed.parent / f"{harmed.name}.damaged").is_dir()
    assert find_damage(newest(run)) is None
    assert same(saved(tiny_run), saved(run))


@pytest.mark.slow
def test_unlooked_at_a_damaged_one_would_be_gone_on_with(
    train_tiny, tiny_run, saved, tmp_path, monkeypatch
):
    """The twin."""
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    flip(newest(run) / "model.safetensors")
    for module in ("runs.manifest", "training.checkpoint_io"):
        monkeypatch.setattr(f"sdtrain.{module}.find_damage", lambda folder: None)
    result = train_tiny(run, "resume=must", "trainer.max_images=72")
    assert result.code == 0 and "is skipped" not in result.out, result.err
    assert not same(saved(tiny_run), saved(run))
