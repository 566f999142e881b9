"""Numbers that are not finite in a tiny run: it ends with 4, or leaves the step out, and no weight
becomes NaN."""

import pytest
import torch
from reading import BARE, checkpoints, finite, lines, newest, status
from torch import nn

from sdtrain.errors import DivergedError
from sdtrain.runs.checkpoint import read_trainer, read_weights
from sdtrain.runs.manifest import find_damage
from sdtrain.training.diverged import FinishedStep, MicroBatchLosses, bad_steps, divergence_error
from sdtrain.training.optimisation import Optimisation
from sdtrain.training.progress import Progress, StepResult

WILD = [
    "optimizer.lr=1.0e+30",
    "trainer.log_every=64",
    "checkpoint.every=8",
    "checkpoint.keep=8",
    "callbacks.samples.every=0",
    "validation=none",
]


def finite_weights(checkpoint) -> bool:
    return all(finite(read_weights(checkpoint, name)) for name in ("model", "ema"))


@pytest.mark.parametrize("fused", ["true", pytest.param("false", marks=pytest.mark.slow)])
def test_divergence_ends_with_4_and_moves_no_weight_to_nan(train_tiny, tmp_path, fused):
    run = tmp_path / "run"
    result = train_tiny(run, *WILD, f"optimizer.fused={fused}")
    assert result.code == 4, result.err
    assert "optimizer.lr" in result.paragraph and "not finite" in result.paragraph
    assert status(run)["state"] == "diverged"
    assert find_damage(newest(run)) is None and finite_weights(newest(run))
    (line,) = (line for line in lines(run) if "train/loss" in line)
    # Before the next save, not at the next line.
    assert line["images_seen"] == int(newest(run).name) + 8 < 64
    assert line["train/gradient_norm"] is None


SICK = """
import torch


class Sick(torch.nn.Conv2d):
    \"\"\"Its answer to the third batch of a run is not a number.\"\"\"

    def __init__(self, *, latent_channels: int) -> None:
        super().__init__(latent_channels, latent_channels, 1)
        self.calls = 0

    def forward(self, x, timestep, context):
        self.calls += self.training
        sick = self.training and self.calls == 3
        return super().forward(x) * (float("nan") if sick else 1.0)
"""


@pytest.fixture
def train_sick(train_tiny, tmp_path, monkeypatch):
    """train_sick(FOLDER, "trainer.max_skipped=1"): a run of that network, which logs and saves at
    every step."""
    packages = tmp_path / "packages"
    packages.mkdir()
    (packages / "sick_network.py").write_text(SICK)
    monkeypatch.syspath_prepend(packages)
    words = [
        "validation=none",
        "callbacks.samples.every=0",
        "trainer.log_every=8",
        "checkpoint.every=8",
        "model.unet._target_=sick_network.Sick",
    ]
    return lambda run, word: train_tiny(run, *words, word)


@pytest.mark.parametrize(
    ("allowed", "reason"),
    [
        ("null", "images (samples 16, 17, 18, 19, 20, 21, 22, 23, t = "),
        ("0", "trainer.max_skipped=0"),
    ],
)
def test_one_sick_batch_ends_the_run(train_sick, tmp_path, allowed, reason):
    run = tmp_path / "run"
    result = train_sick(run, f"trainer.max_skipped={allowed}")
    assert result.code == 4, result.err
    assert reason in result.paragraph
    assert newest(run).name == f"{16:012d}" and finite_weights(newest(run))


def test_one_sick_batch_may_be_left_out(train_sick, tmp_path):
    run = tmp_path / "run"
    result = train_sick(run, "trainer.max_skipped=1")
    assert result.code == 0, result.err
    assert lines(run)[-1]["train/skipped_steps"] == 1 and lines(run)[-1]["images_seen"] == 64
    state = read_trainer(newest(run))
    assert state["ema_steps"] == 7 and state["skipped_steps"] == 1


@pytest.mark.slow
def test_without_the_guard_they_would_be_nan(train_tiny, tmp_path, monkeypatch):
    """The twin. A second guard looks at what is written."""

    def unguarded(self, optimizer, loss):
        zero = loss.new_zeros(())
        (group,) = optimizer.param_groups
        norm = nn.utils.clip_grad_norm_(group["params"], self.gradient_clip)
        return StepResult(zero, zero, norm)

    monkeypatch.setattr(Optimisation, "clip", unguarded)
    result = train_tiny(tmp_path / "run", *WILD)
    assert result.code == 4 and "it is not saved" in result.paragraph, result.err


@pytest.mark.slow
def test_a_divergence_before_the_first_checkpoint_does_not_speak_of_one(train_tiny, tmp_path):
    run = tmp_path / "run"
    result = train_tiny(run, *BARE, "optimizer.lr=1e30", "checkpoint.every=1000")
    assert result.code == 4 and not checkpoints(run), result.err
    assert "last checkpoint is good" not in result.paragraph


def finished(images_seen: int, losses: list[float], times: list[float] | None) -> FinishedStep:
    """A step of one micro-batch, with ordinals up to images_seen and a gradient of norm 1."""
    loss = torch.tensor(losses)
    ordinals = torch.arange(images_seen - len(losses), images_seen)
    drawn_times = None if times is None else torch.tensor(times)
    micro_batch = MicroBatchLosses(ordinals, loss, drawn_times)
    return FinishedStep(images_seen, loss.sum(), torch.ones(()), [micro_batch])


@pytest.mark.parametrize(
    ("times", "named"),
    [([0.25, 0.5], "(samples 3, t = 0.5; loss nan"), (None, "(samples 3; loss nan")],
    ids=["diffusion", "autoencoder"],
)
def test_the_error_names_the_samples_whose_own_loss_was_not_finite(times, named):
    steps = [finished(2, [1.0, 2.0], times), finished(4, [1.0, float("nan")], times)]
    bad = bad_steps(steps)
    assert [step.images_seen for step in bad] == [4] and not bad_steps([])
    given = {"progress": Progress(batch_size=2, max_images=8), "lr": 0.5, "world_size": 1}
    error = divergence_error(bad, len(steps), **given, has_checkpoint=False)
    assert isinstance(error, DivergedError) and error.key == "optimizer.lr"
    assert "1 of the last 2 optimizer steps, first in step 2, which ended at 4" in str(error)
    assert named in str(error) and "(now 0.5)" in error.remedy
    assert "last checkpoint is good" not in str(error)
    later = divergence_error(bad, len(steps), **given, has_checkpoint=True)
    assert "last checkpoint is good" in str(later)
