"""What may change when a run goes on, what it takes to allow it, and that a run killed anywhere
ends in the same weights.
"""

import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path
from random import Random

import pytest
import torch
from lightning.pytorch.strategies import Strategy
from reading import flattened, numbers, status, with_values

from sdtrain.runs.manifest import list_checkpoints, newest_intact
from sdtrain.runs.resume import compare_configs
from sdtrain.training.callbacks.checkpoint import Checkpoints
from sdtrain.training.callbacks.ema import EMACallback
from sdtrain.training.callbacks.validation import Validation
from sdtrain.training.datamodule import DataModule
from sdtrain.training.diffusion_module import DiffusionModule


@pytest.fixture
def middle(tiny_run, tmp_path):
    """A run folder that holds the middle checkpoint of `tiny_run` alone."""
    first = list_checkpoints(tiny_run)[0]
    shutil.copytree(first, tmp_path / "run" / "checkpoints" / first.name)
    return tmp_path / "run"


ANOTHER_RUN = [  # what would make it one, and what allows it
    ("weighting._target_=sdtrain.diffusion.weighting.flat.Flat", "weighting"),
    ("schedule.beta_end=0.02", "schedule"),
    ("data.batch_size=16", "data.batch_size"),
    ("data.seed=4", "data"),
    ("loss._target_=sdtrain.diffusion.losses.Huber", "loss"),
    ("model.caption_dropout=0.2", "model.caption_dropout"),
    ("seed=1", "seed"),
]


@pytest.mark.parametrize(("word", "allowed"), ANOTHER_RUN, ids=[key for _, key in ANOTHER_RUN])
def test_what_would_be_another_run_is_refused_unless_it_is_allowed(composed, word, allowed):
    old = composed()
    new = with_values(old, word)
    key = word.partition("=")[0]
    assert list(compare_configs(old, new).refused) == [key]
    changes = compare_configs(old, new, [allowed])
    assert list(changes.changed) == [key] and not changes.refused


def test_what_is_allowed_and_what_only_looks_is_applied_and_listed(train_tiny, middle):
    """Another weighting, another batch, another rate, and looks and checkpoints at every other
    step."""
    allowed = ["weighting=min_snr", "resume_allow=[weighting,data.batch_size]"]
    other = {
        "data.batch_size": 4,
        "optimizer.lr": 0.0004,
        "validation.every": 8,
        "callbacks.samples.every": 8,
        "checkpoint.every": 8,
        "checkpoint.keep": 5,
        "trainer.log_every": 8,
        "callbacks.ema.decay": 0.5,
    }
    values = [f"{key}={value}" for key, value in other.items()]
    words = ["lr_schedule=constant", *allowed, *values, "resume=must"]
    result = train_tiny(middle, *words)
    assert result.code == 0, result.err
    for key in ("weighting", "lr_schedule._target_", *other):
        assert f"changed since the checkpoint: {key}" in result.out, key
    assert "optimizer.lr: 0.001 -> 0.0004" in result.out
    assert "resume" not in (middle / "config.yaml").read_text()
    found = numbers(middle)
    assert [line["train/lr"] for line in found if "train/lr" in line] == [0.0004, 0.0004]
    for key in ("train/loss", "validation/loss"):
        seen = [line["images_seen"] for line in found if key in line]
        # What is due at the checkpoint, and was not looked at there, is looked at first.
        assert seen == ([48] if key == "validation/loss" else []) + [56, 64]
    grids = sorted(path.name for path in (middle / "samples").glob("grid-*"))
    assert grids == [f"grid-0000000{seen}.png" for seen in (48, 56, 64)]
    assert [int(folder.name) for folder in list_checkpoints(middle)] == [48, 56, 64]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model.unet.block_channels=[16,32]", "resume_allow=[model]"], ["do not fit"]),
        (["data.batch_size=32", "resume_allow=[data]"], ["does not divide"]),
        (
            ["schedule=linear", "data.seed=4", "resume_allow=[weighting]"],
            [
                "schedule._target_: sdtrain.schedules.scaled_linear.scaled_linear -> "
                "sdtrain.schedules.linear.linear",
                "schedule.beta_end: 0.012 -> 0.02",
                "data.seed: 0 -> 4",
                "resume_allow=[weighting,data,schedule]",
            ],
        ),
    ],
)
def test_what_cannot_go_on_is_said_in_a_paragraph(train_tiny, middle, words, said):
    result = train_tiny(middle, *words, "resume=must")
    assert result.code == 2
    for part in said:
        assert part in result.paragraph


def test_another_autoencoder_is_refused_unless_allowed():
    old, new = (
        {"model": {"autoencoder": {"path": None, "sha256": digest}}} for digest in ("a", "b")
    )
    assert list(compare_configs(old, new).refused) == ["model.autoencoder.sha256"]
    allowed = compare_configs(old, new, ["model.autoencoder"])
    assert allowed.changed == {"model.autoencoder.sha256": ("a", "b")}
    assert allowed.refused == {}
    assert compare_configs(old, new, ["model.auto"]).refused  # part of a word is no group


def test_an_unfinished_run_is_found_again_with_what_is_allowed(
    found_by, tiny_run, tmp_path, monkeypatch
):
    run = tmp_path / "runs" / "shapes" / "earlier"
    shutil.copytree(tiny_run, run)
    (run / "status.json").write_text(json.dumps(status(run) | {"state": "interrupted"}))
    monkeypatch.chdir(tmp_path)
    assert found_by("schedule=linear") is None
    assert found_by("schedule=linear", "resume_allow=[schedule]") == run


# 12 steps of two micro-batches, three epochs.
SHORT = [
    "trainer.max_images=384",
    "data.batch_size=32",
    "data.size=128",
    "data.validation_size=32",
    "data.num_workers=1",
    "trainer.accumulate=2",
    "trainer.log_every=32",
    "checkpoint.every=64",
    "validation.every=96",
    "validation.num_images=32",
    "callbacks.samples.every=384",
    "callbacks.samples.guidance_scales=[1,2]",
    "callbacks.noise_levels.every=384",
    "callbacks.noise_levels.num_images=2",
]


def signal_after(owner: type, name: str, last: int, number: int) -> None:
    """The process gets a signal as soon as the call of that number has ended.

    A save under way is let finish before a kill: how much is lost then is known.
    """
    plain = getattr(owner, name)
    calls = itertools.count(1)

    def counted(self, *given):
        result = plain(self, *given)
        if next(calls) == last:
            if number == signal.SIGKILL:
                self.trainer.strategy.checkpoint_io.settle()
            os.kill(os.getpid(), number)
        return result

    setattr(owner, name, counted)


def digest(tensors: dict) -> str:
    """sha256 of all tensors: names, and bits."""
    found = hashlib.sha256()
    for key in sorted(tensors):
        found.update(key.encode() + tensors[key].detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


@pytest.fixture(scope="module")
def whole(train_tiny, tmp_path_factory):
    """A run that was not stopped."""
    run = tmp_path_factory.mktemp("whole") / "run"
    result = train_tiny(run, *SHORT)
    assert result.code == 0, result.err
    return run


@pytest.fixture(scope="module")
def signalled(command, tiny):
    """A process of its own that this happens to. What it leaves with is what it should."""

    def run(
        folder: Path,
        last: int,
        number: int = signal.SIGTERM,
        owner: type = DiffusionModule,
        name: str = "training_step",
    ) -> None:
        before = f"{__file__}:signal_after({owner.__name__}, {name!r}, {last}, {number})"
        words = [*tiny(*SHORT), "resume=auto", f"hydra.run.dir={folder}"]
        result = command("sdtrain", *words, before=before)
        assert result.code == (-number if number == signal.SIGKILL else 143), result.err

    return run


@pytest.fixture(scope="module")
def stopped(signalled, tmp_path_factory):
    run = tmp_path_factory.mktemp("stopped") / "run"
    signalled(run, 10)
    return run


@pytest.fixture
def interrupted(stopped, tmp_path):
    """A run that a SIGTERM has ended in mid-epoch, at 160 images."""
    return shutil.copytree(stopped, tmp_path / "run")


def resumed_at(out: str) -> int:
    return int(
        Path(next(line for line in out.splitlines() if line.startswith("Resuming from"))).name
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lasts", "given", "seen"),
    [
        ([8, 8, 3, 2], [], 352),
        ([15, 9], [signal.SIGKILL], 320),
        ([1], [signal.SIGTERM, Validation, "look"], 96),
    ],
    ids=[
        "the last of two epochs, in mid-window, and again in that epoch",
        "killed twice",
        "after a validation",
    ],
)
def test_interrupted_anywhere_it_ends_in_the_same_bits(
    train_tiny, signalled, saved, whole, tmp_path, lasts, given, seen
):
    """In mid-window, in mid-epoch, after the last batch of an epoch, and there again.

    lasts: micro-batches of each process, of 16 pictures; 8 are an epoch. What goes on last, here
    and below, does so in this process.
    """
    run = tmp_path / "run"
    for last in lasts:
        signalled(run, last, *given)
    result = train_tiny(run, *SHORT, "resume=must")
    assert result.code == 0 and resumed_at(result.out) == seen, result.err + result.out
    assert digest(saved(run)) == digest(saved(whole)) and numbers(run) == numbers(whole)


@pytest.mark.slow
def test_without_workers_too(train_tiny, saved, whole, interrupted):
    words = [*SHORT, "resume=must", "data.num_workers=0"]
    assert train_tiny(interrupted, *words).code == 0
    assert digest(saved(interrupted)) == digest(saved(whole))


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [["strategy=ddp", "trainer.devices=2", "trainer.accumulate=1"], ["trainer.accumulate=4"]],
    ids=["ranks", "windows"],
)
def test_with_other_ranks_or_windows_it_ends_there_to_rounding(
    command, tiny, saved, whole, interrupted, words
):
    middle = flattened(saved(interrupted))
    end = flattened(saved(whole))
    words = [*tiny(*SHORT, *words), "resume=must", f"hydra.run.dir={interrupted}"]
    result = command("sdtrain", *words)
    assert result.code == 0 and [line["images_seen"] for line in numbers(interrupted)] == [
        line["images_seen"] for line in numbers(whole)
    ], result.err
    assert (flattened(saved(interrupted)) - end).norm() < 1e-4 * (end - middle).norm()


BROKEN = {
    "the order starts again": (DataModule, "load_state_dict"),
    "the average starts again": (EMACallback, "load_state_dict"),
    "the moments are lost": (Strategy, "load_optimizer_state_dict"),
    "Lightning counts on": (Checkpoints, "on_load_checkpoint"),
}


@pytest.mark.slow
@pytest.mark.parametrize("guard", BROKEN)
def test_with_a_guard_broken_it_does_not(train_tiny, saved, whole, interrupted, monkeypatch, guard):
    """The twins."""
    words = [*SHORT, "trainer.accumulate=4"] if guard == "Lightning counts on" else SHORT
    monkeypatch.setattr(*BROKEN[guard], lambda *given: None)
    result = train_tiny(interrupted, *words, "resume=must")
    assert result.code == 0, result.err
    if guard == "Lightning counts on":
        assert numbers(interrupted)[-1]["images_seen"] != 384
        return
    right = saved(whole)
    parts = {
        key.partition("/")[0]
        for key, value in saved(interrupted).items()
        if not torch.equal(value, right[key])
    }
    assert parts == ({"ema"} if "average" in guard else {"model", "ema", "optimizer"})


@pytest.mark.slow
def test_killed_at_random_it_loses_an_interval_at_most(
    start, tiny, train_tiny, saved, whole, tmp_path
):
    run = tmp_path / "run"
    random = Random(0)
    for _ in range(2):
        words = [*tiny(*SHORT), "resume=auto", f"hydra.run.dir={run}"]
        running = start("sdtrain", *words)
        goal = (written(run) or [0])[-1] + random.randrange(32, 100)
        running.until(lambda goal=goal: (written(run) or [0])[-1] >= goal)
        time.sleep(random.random() * 0.1)
        os.kill(running.pid, signal.SIGKILL)
        assert running.wait().code == -signal.SIGKILL
        seen = written(run)[-1]
        last, _ = newest_intact(run)
        # One save may have been under way.
        assert last is not None and int(last.name) >= seen // 64 * 64 - 64
    assert train_tiny(run, *SHORT, "resume=must").code == 0
    assert digest(saved(run)) == digest(saved(whole)) and numbers(run) == numbers(whole)


def written(run) -> list[int]:
    """images_seen of the whole lines of metrics.jsonl: the last may be half written."""
    if not (run / "metrics.jsonl").exists():
        return []
    text = (run / "metrics.jsonl").read_text()
    found = re.findall(r'^\{"images_seen": (\d+).*\}$', text, re.MULTILINE)
    return [int(seen) for seen in found]
