"""What goes wrong in the default experiment: numbers that are not finite, and signals at any
moment."""

import math
import shutil
import signal
import time

import pytest
from mishaps import BATCH
from reading import checkpoints, finite, flattened, newest, same, status, tensors

from sdtrain.runs.checkpoint import read_trainer, read_weights, write_checkpoint
from sdtrain.runs.manifest import find_damage

pytestmark = pytest.mark.slow


def same_as(whole, checkpoint) -> bool:
    """Whether a checkpoint is, bit for bit, the one of `whole` at as many images."""
    return same(tensors(checkpoint), tensors(whole / "checkpoints" / checkpoint.name))


def ended_like(whole, run) -> bool:
    return newest(run).name == newest(whole).name and same_as(whole, newest(run))


@pytest.mark.parametrize(
    ("happens", "samples"),
    [("weight", "128, 129, 130, 131, 132, 133, 134, 135, t = "), ("latent", "131, t = ")],
    ids=["weight", "latent"],
)
def test_a_nan_ends_the_run_the_newest_checkpoint_is_the_state_before_and_it_goes_on_from_there(
    train_here, whole, tmp_path, happens, samples
):
    run = tmp_path / "run"
    result = train_here(run, before=f"in_step_5({happens})")
    assert result.code == 4, result.err
    for words in (
        "1 of the last 5 optimizer steps, first in step 5, which ended at 160 images",
        f"(samples {samples}",
        "; loss nan, gradient norm nan)",
        "the last checkpoint is good",
        "optimizer.lr (now 0.002)",
        "trainer.max_skipped",
    ):
        assert words in result.paragraph, result.paragraph
    assert status(run)["state"] == "diverged" and status(run)["exit_code"] == 4
    assert int(newest(run).name) == 4 * BATCH
    assert find_damage(newest(run)) is None and same_as(whole, newest(run))
    if happens == "latent":
        assert train_here(run, "resume=must").code == 0 and ended_like(whole, run)


def test_unasked_before_a_save_a_divergence_is_saved_over(train_here, whole, tmp_path):
    """The twin: the newest checkpoint lacks a step, and the state before it is gone."""
    run = tmp_path / "run"
    assert train_here(run, before="in_step_5(latent), broken('asked')").code == 4
    assert int(newest(run).name) > 4 * BATCH and not same_as(whole, newest(run))


def test_unguarded_a_nan_reaches_every_weight_and_the_disk(train_here, tmp_path):
    """The twin of the other two guards: the step that is masked, and the look at what is saved."""
    run = tmp_path / "run"
    result = train_here(run, before="in_step_5(latent), broken('masked')")
    assert result.code == 4, result.err
    assert "is not finite at 000000000160 images: it is not saved" in result.paragraph
    assert finite(tensors(newest(run)))
    worse = tmp_path / "worse"
    result = train_here(worse, before="in_step_5(latent), broken('masked', 'looked at')")
    assert result.code == 0 and not finite(tensors(newest(worse)))


def test_a_learning_rate_of_1e9_ends_the_run_and_leaves_good_checkpoints(train_here, tmp_path):
    run = tmp_path / "run"
    result = train_here(run, "trainer.max_images=640", "trainer.log_every=640", "optimizer.lr=1e9")
    assert result.code == 4, result.err
    for words in (
        "optimizer steps, first in step ",
        "images (samples ",
        ", t = ",
        "; loss ",
        ", gradient norm ",
        "optimizer.lr (now 1e+09)",
    ):
        assert words in result.paragraph
    assert finite(tensors(newest(run))) and find_damage(newest(run)) is None


@pytest.fixture
def poisoned(whole, tmp_path):
    """A run with two checkpoints, in the newer of which one weight is NaN: whole, by its
    manifest."""
    run = tmp_path / "run"
    for folder in checkpoints(whole)[2:4]:
        shutil.copytree(folder, run / "checkpoints" / folder.name)
    folder = newest(run)
    model = read_weights(folder, "model")
    next(iter(model.values())).view(-1)[0] = math.nan
    average = read_weights(folder, "ema")
    config = (folder / "config.yaml").read_text()
    write_checkpoint(folder, model, average, read_trainer(folder), config)
    assert find_damage(folder) is None
    return run


def test_a_nan_in_a_checkpoint_is_not_gone_on_with(train_here, whole, poisoned):
    result = train_here(poisoned, "resume=must")
    assert result.code == 4, result.err
    assert str(newest(poisoned)) in result.paragraph and "is not finite" in result.paragraph
    shutil.rmtree(newest(poisoned))  # as the paragraph advises
    assert train_here(poisoned, "resume=must").code == 0 and ended_like(whole, poisoned)


def test_unlooked_at_a_nan_in_a_checkpoint_is_called_good(train_here, poisoned):
    """The twin: the samples are blamed, and the checkpoint is not."""
    result = train_here(poisoned, "resume=must", before="broken('looked at')")
    assert result.code == 4
    assert "first in step 5" in result.paragraph
    assert "the last checkpoint is good" in result.paragraph
    assert not finite(tensors(newest(poisoned)))


LOOKING = [
    "callbacks.samples.every=64",
    "callbacks.samples.num_images=2",
    "steps=2",
    "validation.every=64",
    "validation.num_images=32",
]


@pytest.mark.parametrize(
    ("moment", "number", "code", "seen"),
    [
        ("training", signal.SIGINT, 130, [3]),
        ("validation", signal.SIGTERM, 143, [2]),
        ("sampling", signal.SIGTERM, 143, [2]),
        ("saving", signal.SIGTERM, 143, [2, 3, 4]),
    ],
    ids=["Ctrl-C in training", "validation", "sampling", "saving"],
)
def test_a_signal_at_any_moment_ends_the_run_between_two_steps_and_it_goes_on_bit_for_bit(
    train, train_here, whole, tmp_path, moment, number, code, seen
):
    """seen: steps. A save is made by a thread, while training is at one step or the next."""
    run = tmp_path / "run"
    sent = tmp_path / "sent"
    result = train(run, *LOOKING, before=f"signal_in({moment!r}, {int(number)}, {str(sent)!r})")
    assert result.code == code, result.err
    assert time.time() - sent.stat().st_mtime < 30 and "Interrupted at" in result.out
    left = status(run)
    assert (left["state"], left["exit_code"]) == ("interrupted", code)
    assert left["images_seen"] in [steps * BATCH for steps in seen]
    assert int(newest(run).name) == left["images_seen"]
    assert find_damage(newest(run)) is None and same_as(whole, newest(run))
    result = train_here(run, *LOOKING, "resume=must")
    assert result.code == 0 and ended_like(whole, run), result.err


LATER = f"checkpoint.every={3 * BATCH}"
RANKS = ["strategy=ddp", "trainer.devices=2"]
TWICE = "signal_in_step_4(SIGINT, twice=True)"
ON_RANK_1 = "signal_in_step_4(SIGTERM, rank=1)"


def test_a_second_ctrl_c_in_the_midst_of_the_save_leaves_at_once_and_what_is_on_disk_is_whole(
    train, train_here, whole, tmp_path
):
    run = tmp_path / "run"
    result = train(run, LATER, before=TWICE)
    assert result.code == -signal.SIGINT, result.err
    assert [int(folder.name) for folder in checkpoints(run)] == [3 * BATCH]
    assert find_damage(newest(run)) is None
    assert list((run / "checkpoints").glob(".*.tmp"))  # the save was under way
    assert train_here(run, "resume=must").code == 0
    assert ended_like(whole, run) and not list((run / "checkpoints").glob(".*"))


def test_written_in_place_a_checkpoint_would_be_half_there(train, tmp_path):
    """The twin."""
    run = tmp_path / "run"
    assert train(run, LATER, before=f"{TWICE}, checkpoints_in_place()").code == -signal.SIGINT
    assert find_damage(newest(run)) is not None


def test_unheard_a_sigterm_loses_the_steps_since_the_last_save(train, tmp_path):
    """The twin of a signal that is waited out."""
    run = tmp_path / "run"
    result = train(run, LATER, before="signal_in_step_4(SIGTERM), broken('heard')")
    assert result.code == -signal.SIGTERM
    assert status(run)["state"] == "running" and int(newest(run).name) == 3 * BATCH


def test_a_signal_to_rank_1_alone_ends_both_and_the_run_goes_on(train, train_here, whole, tmp_path):
    run = tmp_path / "run"
    result = train(run, LATER, *RANKS, before=ON_RANK_1)
    assert result.code == 143, result.err
    assert status(run)["state"] == "interrupted"
    assert int(newest(run).name) == 4 * BATCH and find_damage(newest(run)) is None
    assert train_here(run, "resume=must").code == 0
    start = flattened(tensors(checkpoints(whole)[0]))
    end = flattened(tensors(newest(whole)))
    resumed = flattened(tensors(newest(run)))
    assert (resumed - end).norm() / (end - start).norm() < 1e-4


def test_where_ranks_do_not_agree_on_a_signal_the_run_is_no_interrupted_one(train, tmp_path):
    """The twin."""
    run = tmp_path / "run"
    happens = f"{ON_RANK_1}, broken('agreed')"
    result = train(run, LATER, *RANKS, "strategy.timeout=10", before=happens)
    assert result.code == 6 and status(run)["state"] == "failed"
