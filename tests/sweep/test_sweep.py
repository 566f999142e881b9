"""Whole sweeps: they end in the same runs however they were stopped."""

import json
import os
import re
import signal

import pytest
from reading import same


@pytest.fixture
def start_sweep(start):
    """start_sweep(FOLDER, "seed=1,2", ..., WANDB_MODE="offline") -> the command in that folder. Its
    arms are real processes, too, which import everything anew."""
    return lambda folder, *words, **env: start("sdtrain", "-m", *words, cwd=folder, env=env)


def ended(sweep) -> tuple[str, int]:
    """What the command has printed, and its exit code."""
    result = sweep.wait()
    return result.out + result.err, result.code


def states(folder) -> dict[str, str]:
    """{arm's name: state} of the sweeps under a folder's runs/."""
    found = {}
    for path in folder.glob("runs/*/*/*/status.json"):
        found[path.parent.name] = json.loads(path.read_text())["state"]
    return found


def wait_for_checkpoint(sweep, folder, arm: str) -> None:
    manifests = f"runs/*/*/{arm}/checkpoints/[0-9]*/manifest.json"
    sweep.until(lambda: list(folder.glob(manifests)))


@pytest.mark.slow
def test_two_arms_of_two_ranks_one_killed_and_finished_by_the_same_command(
    start_sweep, tiny, tmp_path
):
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
    wait_for_checkpoint(running, tmp_path, "schedule=cosine")
    (status,) = tmp_path.glob("runs/*/*/schedule=cosine/status.json")
    os.kill(json.loads(status.read_text())["pid"], signal.SIGKILL)
    printed, code = ended(running)
    assert code == 137, printed
    assert states(tmp_path)["schedule=linear"] == "finished"
    assert "schedule=cosine: exited with -9" in printed
    printed, code = ended(start_sweep(tmp_path, *words, WANDB_MODE="offline"))
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
def test_an_interrupted_sweep_goes_on_to_the_same_weights_and_reports_a_failed_arm(
    start_sweep, here, tiny, saved, tmp_path
):
    words = tiny(
        "optimizer.lr=0.001,1e30",
        "trainer.max_images=320",
        "callbacks.samples.every=0",
        "callbacks.noise_levels.every=0",
        "validation.every=0",
    )
    running = start_sweep(tmp_path, *words)
    wait_for_checkpoint(running, tmp_path, "optimizer.lr=0.001")
    os.kill(running.pid, signal.SIGHUP)
    printed, code = ended(running)
    assert code == 143, printed
    assert "the same command resumes" in printed
    assert "optimizer.lr=1e+30: starts" not in printed
    assert states(tmp_path) == {"optimizer.lr=0.001": "interrupted"}

    printed, code = ended(start_sweep(tmp_path, *words))
    assert code == 4, printed
    assert states(tmp_path) == {
        "optimizer.lr=0.001": "finished",
        "optimizer.lr=1e+30": "diverged",
    }
    assert "optimizer.lr=1e+30: exited with 4 after" in printed
    assert "Not finished: optimizer.lr=1e+30 (4)" in printed
    assert "1 of 2 arms are finished" in printed
    assert len(list(tmp_path.glob("runs/shapes/*"))) == 1

    straight = [word for word in words if not word.startswith("optimizer.lr=")]
    result = here("sdtrain", *straight, "optimizer.lr=0.001", f"hydra.run.dir={tmp_path}/straight")
    assert result.code == 0, result.err
    (interrupted,) = tmp_path.glob("runs/*/*/optimizer.lr=0.001")
    assert same(saved(interrupted), saved(tmp_path / "straight"))


@pytest.mark.slow
def test_arms_that_differ_in_sampling_share_one_training(start_sweep, here, tiny, saved, tmp_path):
    """The second goes on from the last weights of the first, to its own pictures and nothing
    else."""
    folder = tmp_path / "sweep"
    words = [*tiny("callbacks.noise_levels.every=64"), f"hydra.sweep.dir={folder}"]
    out, code = ended(start_sweep(tmp_path, *words, "sampler=ddim,heun"))
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
