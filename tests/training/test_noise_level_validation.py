"""Noise-level validation in a run: what it leaves, and that it changes nothing."""

import json
import math

import numpy as np
import pytest
import torch
from reading import lines, same, with_values

from sdtrain.assemble.load import load
from sdtrain.conditioning.interface import Inputs
from sdtrain.evaluation.noise_level_error import BITS, LEVELS
from sdtrain.randomness import KeyedRandom
from sdtrain.runs.layout import CheckpointFolder
from sdtrain.runs.manifest import find_checkpoint
from sdtrain.schedules.linear import linear
from sdtrain.training.callbacks.levels import EDGES, bin_losses, level_metrics

LOOKS = [
    "callbacks.noise_levels.every=32",
    "callbacks.noise_levels.num_images=4",
    "callbacks.samples.every=0",
]


def looks(run) -> list[dict]:
    """What is left of each validation, in order."""
    return [json.loads(path.read_text()) for path in sorted((run / "validation").glob("*.json"))]


@pytest.fixture(scope="module")
def run(train_tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("looked") / "run"
    assert train_tiny(folder, *LOOKS).code == 0
    return folder


def test_it_leaves_a_number_a_curve_and_every_error(run):
    found = looks(run)
    reported = [line for line in lines(run) if "validation/bits_per_dim" in line]
    assert [look["images_seen"] for look in found] == [32, 64]
    assert len(list((run / "validation").glob("*.png"))) == 2
    for look, line in zip(found, reported, strict=True):
        errors = torch.tensor(look["errors"]["ema"], dtype=torch.float64)
        assert errors.shape == (4, len(LEVELS)) and line["validation/pictures"] == 4
        assert line["validation/bits_per_dim"] == pytest.approx((errors @ BITS).mean().item())
        assert {
            "validation/raw_bits_per_dim",
            "validation/bits_saved",
            "validation/stand_in_share",
            "validation/bits_per_dim_error",
        } <= line.keys()
        outside = ~torch.tensor(look["inside"])
        linear = torch.tensor(look["linear"], dtype=torch.float64)
        assert torch.equal(errors[:, outside], linear[:, outside])
        assert 0 < outside.sum() < len(LEVELS)


def test_the_errors_are_the_networks(run):
    """Asked for again by other means: from the checkpoint, one picture and one level at a time."""
    whole = CheckpointFolder(find_checkpoint(run))
    loaded = load(whole, ema=True, device="cpu", allow=[], autoencoder=None)
    model = loaded.model
    schedule = model.objective.schedule
    held_out = loaded.training_data.data.split("validation")
    random = KeyedRandom(0, "noise levels")
    found = looks(run)[-1]["errors"]["ema"]
    for place, level in ((0, 9), (2, 12), (3, 18)):
        row = held_out[(place, place)]
        x0 = model.autoencoder.encode(row.image[None])
        eps = torch.from_numpy(random.normal(place, tuple(x0.shape[1:])))[None]
        alpha = LEVELS[level].sigmoid().sqrt().float()
        sigma = (-LEVELS[level]).sigmoid().sqrt().float()
        timestep = schedule.timestep(schedule.time_of(LEVELS[level : level + 1]))
        kept = torch.zeros(1, dtype=torch.bool)
        inputs = Inputs([row.caption], torch.tensor([row.label]), kept, tuple(x0.shape[-2:]))
        context = model.conditioner(inputs).context
        both = []
        for sign in (1, -1):
            with torch.no_grad():
                output = model.unet(alpha * x0 + sigma * sign * eps, timestep, context)
            both.append((sign * eps - output).square().mean().item())
        assert found[place][level] == pytest.approx(np.mean(both), rel=1e-4)


@pytest.mark.slow
def test_ranks_share_the_pictures(command, tiny, run, tmp_path):
    """Four ranks, two of them without a picture, find what one finds; nobody waits while
    another validates."""
    words = tiny(
        *LOOKS,
        "trainer.max_images=8",
        "validation=none",
        "optimizer.lr=0",
        "callbacks.noise_levels.num_images=2",
    )
    four = ["strategy=ddp", "trainer.devices=4"]
    result = command("sdtrain", *words, *four, f"hydra.run.dir={tmp_path}/four")
    assert result.code == 0, result.err
    result = command("sdtrain", *words, f"hydra.run.dir={tmp_path}/one")
    assert result.code == 0, result.err
    ours = looks(tmp_path / "four")
    theirs = looks(tmp_path / "one")
    assert [len(look["pictures"]) for look in ours] == [2]
    assert [len(look["pictures"]) for look in theirs] == [2]
    for our, their in zip(ours, theirs, strict=True):
        for weights in ("ema", "raw"):
            one = torch.tensor(our["errors"][weights])
            other = torch.tensor(their["errors"][weights])
            torch.testing.assert_close(one, other, rtol=1e-5, atol=0)


def test_looking_changes_no_weight(run, tiny_run, saved):
    assert same(saved(run), saved(tiny_run))


def test_runs_of_other_seeds_and_schedules_look_at_the_same_pictures_with_the_same_noise(
    train_tiny, run, tmp_path
):
    other = ["seed=5", "schedule=cosine", "prediction=v", "validation=none"]
    words = [*LOOKS, *other, "trainer.max_images=8"]
    assert train_tiny(tmp_path / "run", *words).code == 0
    ours = looks(run)[-1]
    theirs = looks(tmp_path / "run")[-1]
    for key in ("pictures", "mean", "variance", "linear", "autoencoder", "latent_scale"):
        assert ours[key] == theirs[key]
    assert ours["errors"] != theirs["errors"] and sum(theirs["inside"]) > sum(ours["inside"])


@pytest.mark.parametrize(
    "word", ["callbacks.noise_levels.every=-1", "callbacks.noise_levels.num_images=1"]
)
def test_bad_values(refused, composed, word):
    error = refused(word, config=with_values(composed(), word))
    assert error.exit_code == 2 and error.key == word.partition("=")[0]


def test_training_by_level(run):
    """Each line says of every sample since the last where it was and what it cost."""
    for line in lines(run):
        if "train/loss" not in line:
            continue
        counts = line["train/count_by_level"]
        means = line["train/loss_by_level"]
        assert sum(counts) == 16
        assert [mean is None for mean in means] == [count == 0 for count in counts]
        pairs = zip(means, counts, strict=True)
        total = sum(mean * count for mean, count in pairs if count)
        assert total / 16 == pytest.approx(line["train/loss"], rel=1e-4)


def test_the_histogram_is_that_of_the_schedule():
    schedule = linear()
    t = torch.arange(1000, dtype=torch.float64) / 999
    _, counts = bin_losses(schedule, torch.ones(1000), t)
    wanted, _ = np.histogram(schedule.log_snr(t).numpy(), EDGES.numpy())
    assert counts.tolist() == wanted.tolist() and counts.sum() == 1000
    extremes = level_metrics(
        bin_losses(schedule, torch.tensor([1.0, 3.0]), torch.tensor([0.0, 1.0]))
    )
    assert extremes["train/count_by_level"][-3:] == [1, 0, 0]
    assert math.isclose(extremes["train/loss_by_level"][1], 3.0)
