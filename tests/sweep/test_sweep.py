"""Whole sweeps: they end in the same runs however they were stopped."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from reading import same


def start_sweep(folder, *words, **environment) -> subprocess.Popen:
    """The command in a folder of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "sdtrain.commands.train", "-m", *words],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )


def run_sweep(folder, *words, **environment) -> tuple[str, int]:
    """What the command has printed, and its exit code."""
    process = start_sweep(folder, *words, **environment)
    return process.communicate(timeout=300)[0], process.returncode


def states(folder) -> dict[str, str]:
    """{arm's name: state} of the sweeps under a folder's runs/."""
    found = {}
    for path in folder.glob("runs/*/*/*/status.json"):
        found[path.parent.name] = json.loads(path.read_text())["state"]
    return found


def test_a_sweep_is_evaluated_arm_by_arm(here, tiny_run, tmp_path):
    (tmp_path / "a").symlink_to(tiny_run)
    record = tmp_path / "sweep.json"
    record.write_text(json.dumps({"command": [], "arms": ["a", "b"]}))
    words = [
        "sdtrain-evaluate",
        f"checkpoint={tmp_path}",
        "num_images=2",
        "steps=2",
        f"output={tmp_path}/out",
    ]
    result = here(*words)
    assert result.code == 0, result.err
    assert re.search("b\nno checkpoint", result.out)
    (tmp_path / "c" / "checkpoints" / "000000000008").mkdir(parents=True)
    record.write_text(json.dumps({"command": [], "arms": ["c", "a"]}))
    result = here(*words)
    assert result.code == 2
    assert "c could not be evaluated" in result.paragraph
    assert "not evaluated" in result.out
    assert "colour" in result.out
    numbers = json.loads((tmp_path / "out" / "a" / "evaluation.json").read_text())
    assert numbers["prompt_accuracy"]
    assert not (tmp_path / "out" / "b").exists()


@pytest.mark.slow
def test_a_failed_arm_is_reported_while_others_go_on_and_the_same_command_finishes_the_rest(
    tiny, tmp_path
):
    words = tiny("optimizer.lr=0.001,1e30", "callbacks.samples.every=0")
    printed, code = run_sweep(tmp_path, *words)
    assert code == 4, printed
    assert states(tmp_path) == {
        "optimizer.lr=0.001": "finished",
        "optimizer.lr=1e+30": "diverged",
    }
    assert "optimizer.lr=1e+30: exited with 4 after" in printed
    assert "The loss or the gradient was not finite" in printed
    assert "Not finished: optimizer.lr=1e+30 (4)" in printed
    assert "1 of 2 arms are finished" in printed
    (done,) = tmp_path.glob("runs/*/*/optimizer.lr=0.001/status.json")
    before = done.stat().st_mtime_ns
    printed, code = run_sweep(tmp_path, *words)
    assert code == 4
    assert "optimizer.lr=0.001: finished earlier" in printed
    assert done.stat().st_mtime_ns == before
    assert len(list(tmp_path.glob("runs/shapes/*"))) == 1


def wait_for_checkpoint(sweep: subprocess.Popen, folder, arm: str) -> None:
    while not list(folder.glob(f"runs/*/*/{arm}/checkpoints/[0-9]*/manifest.json")):
        assert sweep.poll() is None
        time.sleep(0.02)


@pytest.mark.slow
def test_two_arms_of_two_ranks_one_killed_and_finished_by_the_same_command(tiny, tmp_path):
    """With wandb offline: two runs, two folders, in one group."""
    words = tiny(
        "schedule=linear,cosine",
        "hydra.launcher.parallel=2",
        "strategy=ddp",
        "trainer.devices=2",
        "logger=wandb",
        "trainer.max_images=320",
        "callbacks.samples.every=0",
        "callbacks.noise_levels.every=0",
    )
    running = start_sweep(tmp_path, *words, WANDB_MODE="offline")
    try:
        wait_for_checkpoint(running, tmp_path, "schedule=cosine")
        (status,) = tmp_path.glob("runs/*/*/schedule=cosine/status.json")
        os.kill(json.loads(status.read_text())["pid"], signal.SIGKILL)
        printed = running.communicate(timeout=300)[0]
        assert running.returncode == 137, printed
        assert states(tmp_path)["schedule=linear"] == "finished"
        assert "schedule=cosine: exited with -9" in printed
    finally:
        with contextlib.suppress(ProcessLookupError):
            running.kill()
    printed, code = run_sweep(tmp_path, *words, WANDB_MODE="offline")
    assert code == 0, printed
    assert set(states(tmp_path).values()) == {"finished"}
    assert "schedule=linear: finished earlier" in printed
    for name, processes in (("linear", 1), ("cosine", 2)):
        (folder,) = tmp_path.glob(f"runs/*/*/schedule={name}")
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        seen = [line["images_seen"] for line in lines if "train/loss" in line]
        assert seen == list(range(16, 321, 16))
        files = list(folder.glob("wandb/offline-run-*/run-*.wandb"))
        assert len(files) == processes
        assert len({re.search("run-([^.]+)", file.name)[1] for file in files}) == 1


@pytest.mark.slow
def test_an_interrupted_sweep_goes_on_to_the_same_weights(tiny, saved, tmp_path):
    words = tiny(
        "seed=0,1",
        "trainer.max_images=320",
        "callbacks.samples.every=0",
        "callbacks.noise_levels.every=0",
        "validation.every=0",
    )
    straight = tmp_path / "straight"
    straight.mkdir()
    assert run_sweep(straight, *words)[1] == 0
    running = start_sweep(tmp_path, *words)
    wait_for_checkpoint(running, tmp_path, "seed=0")
    running.send_signal(signal.SIGHUP)
    printed = running.communicate(timeout=300)[0]
    assert running.returncode == 143, printed
    assert "the same command resumes" in printed
    assert "seed=1: starts" not in printed
    assert run_sweep(tmp_path, *words)[1] == 0
    for seed in (0, 1):
        ours = saved(next(tmp_path.glob(f"runs/*/*/seed={seed}")))
        theirs = saved(next(straight.glob(f"runs/*/*/seed={seed}")))
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert value.equal(theirs[name]), name


@pytest.mark.slow
def test_arms_that_differ_in_sampling_share_one_training(here, tiny, saved, tmp_path):
    """The second goes on from the last weights of the first, to its own pictures and nothing
    else."""
    folder = tmp_path / "sweep"
    words = [*tiny("callbacks.noise_levels.every=64"), f"hydra.sweep.dir={folder}"]
    out, code = run_sweep(tmp_path, *words, "sampler=ddim,heun")
    assert code == 0, out
    assert "sampler=heun: samples with the weights of sampler=ddim" in out
    first = folder / "sampler=ddim"
    second = folder / "sampler=heun"
    assert same(saved(second), saved(first))
    assert "train/loss" in (first / "metrics.jsonl").read_text()
    assert "train/loss" not in (second / "metrics.jsonl").read_text()
    pictures = [run / "samples" / "pictures-000000064.png" for run in (first, second)]
    assert pictures[0].read_bytes() != pictures[1].read_bytes()
    assert (second / "trained_by.txt").read_text() == "sampler=ddim\n"
    report = here("sdtrain-report", str(folder))
    assert report.code == 0, report.err
    text = (folder / "report" / "report.md").read_text()
    assert "sampler=heun has the weights of sampler=ddim" in text
