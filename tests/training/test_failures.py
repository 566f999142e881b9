"""What goes wrong in the default experiment, of which only the budget is shortened: numbers that are not finite, signals, full disks."""

import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sdtrain.errors import StorageError
from sdtrain.runs import checkpoint as checkpoints
from sdtrain.runs.checkpoint import damage, published, read_trainer, read_weights, write_checkpoint
from sdtrain.training.callbacks import checkpoint as saving
from sdtrain.training.callbacks import sample_grid
from sdtrain.training.callbacks.metrics_log import MetricsLog
from sdtrain.training.diffusion_module import DiffusionModule
from sdtrain.training.optimisation import Optimisation

pytestmark = pytest.mark.slow

BATCH = 32
SHORT = [
    "trainer.accelerator=cpu",
    "trainer.threads=1",
    "logger=none",
    "data.num_workers=1",
    "callbacks.samples.every=0",
    "validation.every=0",
    f"trainer.max_images={6 * BATCH}",
    f"trainer.log_every={6 * BATCH}",
    f"checkpoint.every={BATCH}",
    "callbacks.noise_levels.num_images=2",
]


def tensors(folder) -> dict:
    """Weights, average and moments of one checkpoint."""
    found = {
        f"{name}/{key}": value
        for name in ("model", "ema")
        for key, value in read_weights(folder, name).items()
    }
    state = read_trainer(folder)["optimizer_states"][0]["state"]
    return found | {
        f"optimizer/{number}/{key}": value
        for number, moments in state.items()
        for key, value in moments.items()
    }


def newest(run) -> Path:
    return published(run)[-1]


def same(folder, whole) -> bool:
    """Whether a checkpoint is, bit for bit, the one of `whole` at as many images."""
    a, b = tensors(folder), tensors(whole / "checkpoints" / folder.name)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def ended(run, whole) -> bool:
    return newest(run).name == newest(whole).name and same(newest(run), whole)


def finite(folder) -> bool:
    return all(value.isfinite().all() for value in tensors(folder).values())


def status(run) -> dict:
    return json.loads((run / "status.json").read_text())


@pytest.fixture(scope="module")
def train(command):
    """train(RUN, "seed=1", ..., before="CALL()"): the experiment in a process of its own, to its end. CALL is of this file."""

    def run(folder: Path, *words: str, before: str = ""):
        return command(
            "sdtrain",
            *SHORT,
            *words,
            f"hydra.run.dir={folder}",
            before=before and f"{__file__}:{before}",
        )

    return run


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    """The run to which nothing happens, with all its checkpoints."""
    run = tmp_path_factory.mktemp("whole") / "run"
    result = train(run, "checkpoint.keep=6")
    assert result.code == 0, result.err
    return run


# What follows, up to the tests, is called in the processes that they start.


def nothing(*given) -> None:
    """What a broken guard does."""


def unguarded(self, optimizer, loss):
    norm = nn.utils.clip_grad_norm_(
        [p for group in optimizer.param_groups for p in group["params"]], self.gradient_clip
    )
    self.judged = torch.zeros(()), torch.zeros(())
    return norm


def beside(self, name):
    return self if self.parent.name == "checkpoints" else self.parent / name


GUARDS = {
    "asked": (MetricsLog, "on_save_checkpoint", nothing),
    "masked": (Optimisation, "clip", unguarded),
    "looked at": (saving, "not_finite", nothing),
    "heard": (saving.Signals, "install", nothing),
    "agreed": (saving.Checkpoints, "agreed", lambda self: (self.signals.received, False)),
    "aside": (Path, "with_name", beside),
}


def broken(*guards: str) -> None:
    for guard in guards:
        setattr(*GUARDS[guard])


def weight(module, batch) -> None:
    with torch.no_grad():
        next(module.unet.parameters()).view(-1)[0] = math.nan


def latent(module, batch) -> None:
    autoencoder = module.autoencoder
    encode = autoencoder.encode

    def once(image, posterior):
        latents = encode(image, posterior).clone()
        latents[3, 0, 0, 0] = math.nan
        autoencoder.encode = encode
        return latents

    autoencoder.encode = once


def in_step_5(what) -> None:
    """Something happens to the module or the batch at the start of the fifth step."""
    step = DiffusionModule.training_step

    def sick(self, batch, batch_index):
        if batch.stream_end == 5 * BATCH:
            what(self, batch)
        return step(self, batch, batch_index)

    DiffusionModule.training_step = sick


MOMENTS = {
    "training": (DiffusionModule, "training_step", 3),
    "validation": (DiffusionModule, "validate", 1),
    "sampling": (sample_grid, "generate", 1),
    "saving": (saving, "write_checkpoint", 2),
}


def signal_in(moment: str, number: int, sent: str) -> None:
    """The signal comes inside the call of that number, and the file `sent` with it."""
    owner, name, call = MOMENTS[moment]
    method, calls = getattr(owner, name), itertools.count(1)

    def signalled(*given, **named):
        if next(calls) == call:
            Path(sent).touch()
            os.kill(os.getpid(), number)
        return method(*given, **named)

    setattr(owner, name, signalled)


def signal_in_step_4(number: int, *, rank: int = 0, twice: bool = False) -> None:
    """The third step's checkpoint is there. Twice: once more in the save that follows."""
    step, save_file, sent = DiffusionModule.training_step, checkpoints.save_file, []

    def signalled_step(self, batch, batch_index):
        if batch_index == 3 and self.global_rank == rank:
            self.trainer.strategy.checkpoint_io.settle()
            sent.append(number)
            os.kill(os.getpid(), number)
        return step(self, batch, batch_index)

    def signalled_save(*given):
        save_file(*given)
        if sent and twice:
            os.kill(os.getpid(), number)
            threading.Event().wait()  # until the main thread has ended the process

    DiffusionModule.training_step, checkpoints.save_file = signalled_step, signalled_save


def full_from_step_3(disk: str, until: int = 99) -> None:
    """No byte is free on the disk from the third step to the one before `until`."""
    step, ballast = DiffusionModule.training_step, Path(disk, "ballast")

    def filled(self, batch, batch_index):
        self.trainer.strategy.checkpoint_io.settle()
        if batch.stream_end == 3 * BATCH:
            fill(ballast)
        if batch.stream_end == until * BATCH:
            ballast.unlink()
        return step(self, batch, batch_index)

    DiffusionModule.training_step = filled


def fill(path) -> None:
    with pytest.raises(OSError, match="No space left"), open(path, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def rash_when_full(disk: str) -> None:
    """The older checkpoints go before the newer is written, and somebody else takes the room."""
    write = saving.write_checkpoint

    def rash(folder, *given):
        if Path(disk, "ballast").exists():
            for old in published(folder.parent.parent):
                shutil.rmtree(old)
            fill(Path(disk, "more"))
        write(folder, *given)

    saving.write_checkpoint = rash


@pytest.mark.parametrize(
    ("what", "samples"),
    [("weight", "128, 129, 130, 131, 132, 133, 134, 135, t = "), ("latent", "131, t = ")],
    ids=["weight", "latent"],
)
def test_a_nan_ends_the_run_the_newest_checkpoint_is_the_state_before_and_it_goes_on_from_there(
    train, whole, tmp_path, what, samples
):
    run = tmp_path / "run"
    result = train(run, before=f"in_step_5({what})")
    assert result.code == 4, result.err
    for said in (
        "1 of the last 5 optimizer steps, first in step 5, which ended at 160 images",
        f"(samples {samples}",
        "; loss nan, gradient norm nan)",
        "the last checkpoint is good",
        "optimizer.lr (now 0.002)",
        "trainer.max_skipped",
    ):
        assert said in result.paragraph, result.paragraph
    assert status(run)["state"] == "diverged" and status(run)["exit_code"] == 4
    assert (
        int(newest(run).name) == 4 * BATCH
        and damage(newest(run)) is None
        and same(newest(run), whole)
    )
    assert train(run, "resume=must").code == 0 and ended(run, whole)


def test_unasked_before_a_save_a_divergence_is_saved_over(train, whole, tmp_path):
    """The twin: the newest checkpoint lacks a step, and the state before it is gone."""
    run = tmp_path / "run"
    assert train(run, before="in_step_5(latent), broken('asked')").code == 4
    assert int(newest(run).name) > 4 * BATCH and not same(newest(run), whole)


def test_unguarded_a_nan_reaches_every_weight_and_the_disk(train, tmp_path):
    """The twin of the other two guards: the step that is masked, and the look at what is saved."""
    run = tmp_path / "run"
    result = train(run, before="in_step_5(latent), broken('masked')")
    assert (
        result.code == 4
        and "is not finite at 000000000160 images: it is not saved" in result.paragraph
    ), result.err
    assert finite(newest(run))
    result = train(tmp_path / "worse", before="in_step_5(latent), broken('masked', 'looked at')")
    assert result.code == 0 and not finite(newest(tmp_path / "worse"))


def test_a_learning_rate_of_1e9_ends_the_run_and_leaves_good_checkpoints(train, tmp_path):
    run = tmp_path / "run"
    result = train(run, "trainer.max_images=640", "trainer.log_every=640", "optimizer.lr=1e9")
    assert result.code == 4, result.err
    for said in (
        "optimizer steps, first in step ",
        "images (samples ",
        ", t = ",
        "; loss ",
        ", gradient norm ",
        "optimizer.lr (now 1e+09)",
    ):
        assert said in result.paragraph
    assert published(run) and finite(newest(run)) and damage(newest(run)) is None


@pytest.fixture
def poisoned(whole, tmp_path):
    """A run with two checkpoints, in the newer of which one weight is NaN: whole, by its manifest."""
    run = tmp_path / "run"
    for folder in published(whole)[2:4]:
        shutil.copytree(folder, run / "checkpoints" / folder.name)
    folder = newest(run)
    model = read_weights(folder, "model")
    next(iter(model.values())).view(-1)[0] = math.nan
    write_checkpoint(
        folder,
        model,
        read_weights(folder, "ema"),
        read_trainer(folder),
        (folder / "config.yaml").read_text(),
    )
    assert damage(folder) is None
    return run


def test_a_nan_in_a_checkpoint_is_not_gone_on_with(train, whole, poisoned):
    result = train(poisoned, "resume=must")
    assert (
        result.code == 4
        and str(newest(poisoned)) in result.paragraph
        and "is not finite" in result.paragraph
    ), result.err
    shutil.rmtree(newest(poisoned))  # as it says
    assert train(poisoned, "resume=must").code == 0 and ended(poisoned, whole)


def test_unlooked_at_a_nan_in_a_checkpoint_is_called_good(train, poisoned):
    """The twin: the samples are blamed, and the checkpoint is not."""
    result = train(poisoned, "resume=must", before="broken('looked at')")
    assert (
        result.code == 4
        and "first in step 5" in result.paragraph
        and "the last checkpoint is good" in result.paragraph
    )
    assert not finite(newest(poisoned))


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
        ("training", signal.SIGTERM, 143, [3]),
        ("validation", signal.SIGTERM, 143, [2]),
        ("sampling", signal.SIGTERM, 143, [2]),
        ("saving", signal.SIGTERM, 143, [2, 3, 4]),
        ("training", signal.SIGINT, 130, [3]),
    ],
    ids=["training", "validation", "sampling", "saving", "Ctrl-C"],
)
def test_a_signal_at_any_moment_ends_the_run_between_two_steps_and_it_goes_on_bit_for_bit(
    train, whole, tmp_path, moment, number, code, seen
):
    """seen: steps. A save is made by a thread, while training is at one step or the next."""
    run, sent = tmp_path / "run", tmp_path / "sent"
    result = train(run, *LOOKING, before=f"signal_in({moment!r}, {number}, {str(sent)!r})")
    assert (
        result.code == code
        and time.time() - sent.stat().st_mtime < 30
        and "Interrupted at" in result.out
    ), result.err
    assert (status(run)["state"], status(run)["exit_code"]) == ("interrupted", code)
    assert status(run)["images_seen"] in [steps * BATCH for steps in seen]
    assert (
        int(newest(run).name) == status(run)["images_seen"]
        and damage(newest(run)) is None
        and same(newest(run), whole)
    )
    result = train(run, *LOOKING, "resume=must")
    assert result.code == 0 and ended(run, whole), result.err


LATER, RANKS = f"checkpoint.every={3 * BATCH}", ["strategy=ddp", "trainer.devices=2"]
TWICE, ON_RANK_1 = (
    "signal_in_step_4(signal.SIGINT, twice=True)",
    "signal_in_step_4(signal.SIGTERM, rank=1)",
)


def test_a_second_ctrl_c_in_the_midst_of_the_save_leaves_at_once_and_what_is_on_disk_is_whole(
    train, whole, tmp_path
):
    run = tmp_path / "run"
    result = train(run, LATER, before=TWICE)
    assert result.code == -signal.SIGINT, result.err
    assert [int(folder.name) for folder in published(run)] == [3 * BATCH] and damage(
        newest(run)
    ) is None
    assert list((run / "checkpoints").glob(".*.tmp"))  # the save was under way
    assert train(run, "resume=must").code == 0
    assert ended(run, whole) and not list((run / "checkpoints").glob(".*"))


def test_written_in_place_a_checkpoint_would_be_half_there(train, tmp_path):
    """The twin."""
    assert train(tmp_path / "run", LATER, before=f"{TWICE}, broken('aside')").code == -signal.SIGINT
    assert damage(newest(tmp_path / "run")) is not None


def test_unheard_a_sigterm_loses_the_steps_since_the_last_save(train, tmp_path):
    """The twin of a signal that is waited out."""
    run = tmp_path / "run"
    assert (
        train(run, LATER, before="signal_in_step_4(signal.SIGTERM), broken('heard')").code
        == -signal.SIGTERM
    )
    assert status(run)["state"] == "running" and int(newest(run).name) == 3 * BATCH


def test_a_signal_to_rank_1_alone_ends_both_and_the_run_goes_on(train, whole, tmp_path):
    run = tmp_path / "run"
    result = train(run, LATER, *RANKS, before=ON_RANK_1)
    assert result.code == 143, result.err
    assert (
        status(run)["state"] == "interrupted"
        and int(newest(run).name) == 4 * BATCH
        and damage(newest(run)) is None
    )
    assert train(run, "resume=must").code == 0
    start, end, resumed = (
        torch.cat(
            [
                value.double().flatten()
                for key, value in tensors(folder).items()
                if key.startswith("model/")
            ]
        )
        for folder in (published(whole)[0], newest(whole), newest(run))
    )
    assert (resumed - end).norm() / (end - start).norm() < 1e-4


def test_where_ranks_do_not_agree_on_a_signal_the_run_is_no_interrupted_one(train, tmp_path):
    """The twin."""
    result = train(
        tmp_path / "run",
        LATER,
        *RANKS,
        "strategy.timeout=10",
        before=f"{ON_RANK_1}, broken('agreed')",
    )
    assert result.code == 6 and status(tmp_path / "run")["state"] == "failed"


@pytest.fixture
def disk(tmp_path):
    """A file system of its own with room for four checkpoints."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=360m", "none", str(place)], capture_output=True
    ).returncode:
        pytest.skip("file systems can be mounted by root alone")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def said(result) -> list[str]:
    return [line for line in result.err.splitlines() if line.startswith("sdtrain: ")]


@pytest.mark.parametrize(("allowed", "reached"), [(3, 6), (1, 5)])
def test_on_a_full_disk_training_goes_on_the_older_checkpoints_stay_and_it_ends_with_5(
    train, whole, disk, allowed, reached
):
    """To the end, where the last save must hold, or until too many in a row have failed."""
    result = train(
        disk / "run",
        "trainer.log_every=32",
        f"checkpoint.max_failed_saves={allowed}",
        before=f"full_from_step_3({str(disk)!r})",
    )
    assert (
        result.code == 5
        and "Traceback" not in result.err
        and f"{reached * BATCH} of {6 * BATCH} images" in result.out
    ), result.err
    assert "hydra.run.dir" in said(result)[-1] and "MiB are free" in said(result)[-1]
    assert f"Training goes on; 1 of at most {allowed} saves in a row have failed" in result.err
    assert [int(folder.name) for folder in published(disk / "run")] == [BATCH, 2 * BATCH]
    for folder in published(disk / "run"):
        assert damage(folder) is None and same(folder, whole)
    seen = [
        line["images_seen"]
        for line in map(json.loads, (disk / "run" / "metrics.jsonl").read_text().splitlines())
        if "train/loss" in line
    ]
    assert (
        seen == [32 * (place + 1) for place in range(len(seen))] and len(seen) >= 2
    )  # as far as the last block goes, and no half a line
    assert not list((disk / "run").rglob(".*.tmp"))


def test_when_a_full_disk_has_room_again_nothing_is_missing_but_a_picture(train, whole, disk):
    words = [
        "trainer.log_every=32",
        "callbacks.samples.every=96",
        "callbacks.samples.num_images=2",
        "steps=2",
    ]
    result = train(disk / "run", *words, before=f"full_from_step_3({str(disk)!r}, until=5)")
    assert result.code == 0 and "Training goes on without this picture" in result.err, result.err
    lines = [json.loads(line) for line in (disk / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["images_seen"] for line in lines if "train/loss" in line] == [
        32,
        64,
        96,
        128,
        160,
        192,
    ] and status(disk / "run")["state"] == "finished"
    assert {path.name for path in (disk / "run" / "samples").iterdir()} == {
        "forward.png",
        *(f"{kind}-000000192.png" for kind in ("grid", "strip", "pictures", "guidance")),
    }
    assert ended(disk / "run", whole) and damage(newest(disk / "run")) is None


def test_room_made_by_removing_the_older_ones_first_would_leave_none(train, disk):
    """The twin of the older ones that stay."""
    result = train(
        disk / "run", before=f"full_from_step_3({str(disk)!r}), rash_when_full({str(disk)!r})"
    )
    assert result.code == 5 and not published(disk / "run"), result.err


def test_lines_of_numbers_that_the_disk_refuses_wait_for_room(tmp_path, capsys):
    log, trainer = (
        MetricsLog(every=1, run_dir=tmp_path),
        SimpleNamespace(
            is_global_zero=True, loggers=[], datamodule=SimpleNamespace(images_seen=32)
        ),
    )
    log.started, log.path = 0.0, Path("/dev/full")
    log.report(trainer, {"train/loss": 1.0})
    assert "No space left" in capsys.readouterr().err
    with pytest.raises(StorageError, match="1 lines are lost"):
        log.on_train_end(trainer, None)
    log.path = tmp_path / "metrics.jsonl"
    log.report(trainer, {"train/loss": 2.0})
    assert [json.loads(line)["train/loss"] for line in log.path.read_text().splitlines()] == [
        1.0,
        2.0,
    ]
    log.on_train_end(trainer, None)
