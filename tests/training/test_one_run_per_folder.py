"""Two runs never write into one folder, and a dead run's lock is free."""

import contextlib
import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from reading import BARE, numbers, status

from sdtrain.config.compose import folder_has_timestamp
from sdtrain.errors import UserError
from sdtrain.runs import lock
from sdtrain.runs.lock import has_stale_lock
from sdtrain.training.diffusion_module import DiffusionModule

HOLDER = """
import pathlib, sys
from sdtrain.runs.lock import hold_lock
with hold_lock(pathlib.Path(sys.argv[1]), print):
    print("holds", flush=True)
    input()
"""


@contextlib.contextmanager
def held(folder: Path):
    """Another process holds the lock of that folder."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], **pipes) as holder:
        assert holder.stdout.readline() == "holds\n"
        yield holder
        holder.communicate("\n")


def test_a_run_that_is_under_way_is_left_alone(train_tiny, tiny_run, tmp_path):
    """Two commands of one shell loop start in the same second: ${now:...} gives them the same
    folder.
    """
    run = shutil.copytree(tiny_run, tmp_path / "run")
    with held(run) as holder:
        assert not has_stale_lock(run)
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        for resume in ("never", "auto"):
            words = ["trainer.max_images=8", "seed=1", f"resume={resume}"]
            result = train_tiny(run, *words)
            assert result.code == 2, result.err
            assert "hydra.run.dir" in result.paragraph
            assert f"process {holder.pid} on" in result.paragraph
        after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        assert after == before and run / ".lock" in after
    assert not has_stale_lock(run)
    (run / ".lock").touch()  # as a process leaves it that was killed
    assert has_stale_lock(run)


TOGETHER = """
import contextlib, os, signal, sys
import sdtrain.training.run
from sdtrain.commands import train
from sdtrain.runs.layout import RunFolder

print("ready", flush=True)
for line in sys.stdin:
    how, folder = line.rstrip().split(" ", 1)
    pid = os.fork()
    if pid == 0:
        signal.alarm(120)
        sys.argv.append(f"hydra.run.dir={folder}")
        if how == "unlocked":
            train.hold_run_folder = lambda folder, **_: contextlib.nullcontext(RunFolder(folder))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        train.main()
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def at_once(tiny, tmp_path_factory):
    """at_once("locked", RUN) -> [(exit code, stderr)] of two commands that begin in the same
    moment in that folder. They are forks of two processes that wait."""
    folder = tmp_path_factory.mktemp("together")
    script = folder / "together.py"
    script.write_text(TOGETHER)
    words = tiny("checkpoint.every=1000", "callbacks.samples.every=0")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    both = []
    errors = []
    for number in range(2):
        errors.append(open(folder / f"stderr-{number}", "w+"))
        command = [sys.executable, str(script), *words]
        both.append(subprocess.Popen(command, cwd=folder, stderr=errors[-1], **pipes))

    def ends(how: str, run: Path) -> list[tuple[int, str]]:
        starts = [file.seek(0, os.SEEK_END) for file in errors]
        for each in both:
            each.stdin.write(f"{how} {run}\n")
            each.stdin.flush()
        codes = [int(each.stdout.readline()) for each in both]
        said = []
        for file, start in zip(errors, starts, strict=True):
            file.seek(start)
            said.append(file.read())
        return sorted(zip(codes, said, strict=True))

    try:
        assert [each.stdout.readline() for each in both] == ["ready\n"] * 2
        yield ends
    finally:
        for each in both:
            each.stdin.close()
            each.wait()
        for file in errors:
            file.close()


ALL_LINES = [16, 32, 48, 64]


def images_logged(run: Path) -> list[int]:
    return [line["images_seen"] for line in numbers(run) if "train/loss" in line]


@pytest.mark.slow
def test_of_two_that_start_at_once_in_one_folder_one_trains(at_once, tmp_path):
    run = tmp_path / "run"
    (won, _), (lost, err) = at_once("locked", run)
    assert (won, lost) == (0, 2)
    assert f"process {status(run)['pid']} on {socket.gethostname()} since 20" in err
    assert "hydra.run.dir" in err
    assert status(run)["state"] == "finished"
    assert not (run / "error.log").exists()
    assert not (run / ".lock").exists()
    assert images_logged(run) == ALL_LINES


@pytest.mark.slow
def test_unlocked_two_that_start_at_once_spoil_each_others_run(at_once, tmp_path):
    """The twin: both train, and write into one file, unless one trips over the other. On a loaded
    machine one may be so late that it finds a finished run, so there are several tries.
    """
    outcomes = []
    for number in range(4):
        run = tmp_path / f"run {number}"
        codes = [code for code, _ in at_once("unlocked", run)]
        both_trained = 2 not in codes
        if both_trained and (any(codes) or images_logged(run) != ALL_LINES):
            return
        outcomes.append((codes, images_logged(run)))
    raise AssertionError(outcomes)


def test_a_dead_runs_lock_is_taken_over_and_held_while_it_trains(train_tiny, tmp_path, monkeypatch):
    """Also where its process id belongs to a process that lives: the holder is who holds the lock,
    not who is named.
    """
    run = tmp_path / "run"
    run.mkdir()
    named = f"process {os.getppid()} on {socket.gethostname()} since 2020-01-01 00:00:00\n"
    (run / ".lock").write_text(named)
    left = {"state": "running", "pid": os.getppid(), "images_seen": 0}
    (run / "status.json").write_text(json.dumps(left))
    step = DiffusionModule.training_step
    others = []

    def tried_by_another(*given):
        other = [sys.executable, "-c", HOLDER, str(run)]
        others.append(subprocess.run(other, input="\n", capture_output=True, text=True))
        return step(*given)

    monkeypatch.setattr(DiffusionModule, "training_step", tried_by_another)
    assert train_tiny(run, *BARE, "trainer.max_images=8").code == 0
    assert status(run)["state"] == "finished" and not (run / ".lock").exists()
    (other,) = others
    assert other.returncode and f"process {os.getpid()} on" in other.stderr


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    def refuses(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "lockf", refuses)
    lines = []
    with lock.hold_lock(tmp_path, lines.append):
        assert len(lines) == 1 and "No locks available" in lines[0] and str(tmp_path) in lines[0]
    assert not list(tmp_path.iterdir())


def test_what_begins_in_the_same_second_lies_beside_it(tmp_path):
    """A run or a sweep that is under way in a folder of this moment's name, or has ended there. A
    folder that was typed is no other's."""
    moment = tmp_path / "2026-01-01_00-00-00"
    moment.mkdir()
    (tmp_path / f"{moment.name}-2").mkdir()
    (tmp_path / f"{moment.name}-2" / "config.yaml").touch()
    with held(moment):
        with lock.hold_run_folder(moment, has_timestamp=True) as run:
            assert run.path == tmp_path / f"{moment.name}-3"
            assert run.lock.exists()
        with pytest.raises(UserError), lock.hold_run_folder(moment, has_timestamp=False):
            raise AssertionError
    assert not run.path.exists()  # nothing was written into it
    with lock.hold_run_folder(moment, has_timestamp=True) as run:
        assert run.path == moment


@pytest.mark.parametrize("kind", ["run", "sweep"])
def test_a_folder_is_of_this_moment_where_its_name_is_the_time(kind):
    for folder, expected in (("runs/a/${now:%H-%M}", True), ("runs/a", False)):
        node = OmegaConf.create({kind: {"dir": folder}})[kind]
        assert folder_has_timestamp(node) == expected
