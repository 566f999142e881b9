"""What goes wrong in the default experiment, of which only the budget is shortened: numbers that are not finite, signals, full disks."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sdtrain.callbacks import checkpoint as saving
from sdtrain.callbacks import sample_grid
from sdtrain.callbacks.metrics_log import MetricsLog
from sdtrain.checkpoints import damage, published, read_trainer, read_weights, write_checkpoint
from sdtrain.errors import StorageError
from sdtrain.module import DiffusionModule
from sdtrain.optimisation import Optimisation

pytestmark = pytest.mark.slow

BATCH = 32
SHORT = [
    "trainer.accelerator=cpu", "trainer.threads=1", "logger=none", "data.num_workers=1", "callbacks.samples.every=0", "validation.every=0",
    f"trainer.max_images={6 * BATCH}", f"trainer.log_every={6 * BATCH}", f"checkpoint.every={BATCH}",
]


def tensors(folder) -> dict:
    """Weights, average and moments of one checkpoint."""
    found = {f"{name}/{key}": value for name in ("model", "ema") for key, value in read_weights(folder, name).items()}
    state = read_trainer(folder)["optimizer_states"][0]["state"]
    return found | {f"optimizer/{number}/{key}": value for number, moments in state.items() for key, value in moments.items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def finite(folder) -> bool:
    return all(value.isfinite().all() for value in tensors(folder).values())


def status(run) -> dict:
    return json.loads((run / "status.json").read_text())


@pytest.fixture(scope="module")
def whole(here, tmp_path_factory):
    """The run to which nothing happens, with all its checkpoints."""
    run = tmp_path_factory.mktemp("whole") / "run"
    result = here("sdtrain", *SHORT, "checkpoint.keep=6", f"hydra.run.dir={run}")
    assert result.code == 0, result.err
    return run


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


@pytest.fixture
def in_step_5(monkeypatch):
    """Something happens to the module or the batch at the start of the fifth step."""
    def patch(what):
        step = DiffusionModule.training_step

        def sick(self, batch, batch_index):
            if batch.stream_end == 5 * BATCH:
                what(self, batch)
            return step(self, batch, batch_index)

        monkeypatch.setattr(DiffusionModule, "training_step", sick)
    return patch


@pytest.mark.parametrize(("what", "samples"), [(weight, "128, 129, 130, 131, 132, 133, 134, 135, t = "), (latent, "131, t = ")], ids=["weight", "latent"])
def test_a_nan_ends_the_run_and_the_newest_checkpoint_is_the_state_before(here, whole, in_step_5, tmp_path, what, samples):
    in_step_5(what)
    run = tmp_path / "run"
    result = here("sdtrain", *SHORT, f"hydra.run.dir={run}")
    assert result.code == 4, result.err
    for said in ("1 of the last 5 optimizer steps, first in step 5, which ended at 160 images", f"(samples {samples}", "; loss nan, gradient norm nan)",
                 "the last checkpoint is good", "optimizer.lr (now 0.002)", "trainer.max_skipped"):
        assert said in result.paragraph, result.paragraph
    assert status(run)["state"] == "diverged" and status(run)["exit_code"] == 4
    newest = published(run)[-1]
    assert newest.name == f"{4 * BATCH:012d}" and damage(newest) is None
    assert same(tensors(newest), tensors(whole / "checkpoints" / newest.name))


def test_a_run_that_has_diverged_goes_on_as_if_it_had_not(here, whole, in_step_5, tmp_path, monkeypatch):
    """With what was wrong put right: to the same end, bit for bit."""
    run = tmp_path / "run"
    in_step_5(latent)
    assert here("sdtrain", *SHORT, f"hydra.run.dir={run}").code == 4
    monkeypatch.undo()
    result = here("sdtrain", *SHORT, "resume=must", f"hydra.run.dir={run}")
    assert result.code == 0, result.err
    assert same(tensors(published(run)[-1]), tensors(published(whole)[-1]))


def test_unasked_before_a_save_a_divergence_is_saved_over(here, whole, in_step_5, tmp_path, monkeypatch):
    """The twin: the newest checkpoint lacks a step, and the state before it is gone."""
    monkeypatch.setattr(MetricsLog, "on_save_checkpoint", lambda *given: None)
    in_step_5(latent)
    run = tmp_path / "run"
    assert here("sdtrain", *SHORT, f"hydra.run.dir={run}").code == 4
    newest = published(run)[-1]
    assert int(newest.name) > 4 * BATCH and not same(tensors(newest), tensors(whole / "checkpoints" / newest.name))


def test_unguarded_a_nan_reaches_every_weight_and_the_disk(here, in_step_5, tmp_path, monkeypatch):
    """The twin of the other two guards: the step that is masked, and the look at what is saved."""
    def unguarded(self, optimizer, loss):
        norm = nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], self.gradient_clip)
        self.judged = torch.zeros(()), torch.zeros(())
        return norm

    monkeypatch.setattr(Optimisation, "clip", unguarded)
    in_step_5(latent)
    run = tmp_path / "run"
    result = here("sdtrain", *SHORT, f"hydra.run.dir={run}")
    assert result.code == 4 and "is not finite at 000000000160 images: it is not saved" in result.paragraph, result.err
    assert finite(published(run)[-1])
    monkeypatch.setattr(saving, "not_finite", lambda tensors: None)
    result = here("sdtrain", *SHORT, f"hydra.run.dir={tmp_path}/worse")
    assert result.code == 0 and not finite(published(tmp_path / "worse")[-1])


def test_a_learning_rate_of_1e9_ends_the_run_and_leaves_good_checkpoints(here, tmp_path):
    words = [word for word in SHORT if not word.startswith(("trainer.max_images", "trainer.log_every"))]
    run = tmp_path / "run"
    result = here("sdtrain", *words, "trainer.max_images=640", "trainer.log_every=640", "optimizer.lr=1e9", f"hydra.run.dir={run}")
    assert result.code == 4, result.err
    for said in ("optimizer steps, first in step ", "images (samples ", ", t = ", "; loss ", ", gradient norm ", "optimizer.lr (now 1e+09)"):
        assert said in result.paragraph
    assert published(run) and finite(published(run)[-1]) and damage(published(run)[-1]) is None


@pytest.fixture
def poisoned(whole, tmp_path):
    """A run with two checkpoints, in the newer of which one weight is NaN: whole, by its manifest."""
    run = tmp_path / "run"
    for folder in published(whole)[2:4]:
        shutil.copytree(folder, run / "checkpoints" / folder.name)
    folder = published(run)[-1]
    model = read_weights(folder, "model")
    next(iter(model.values())).view(-1)[0] = math.nan
    write_checkpoint(folder, model, read_weights(folder, "ema"), read_trainer(folder), (folder / "config.yaml").read_text())
    assert damage(folder) is None
    return run


def test_a_nan_in_a_checkpoint_is_not_gone_on_with(here, whole, poisoned):
    result = here("sdtrain", *SHORT, "resume=must", f"hydra.run.dir={poisoned}")
    assert result.code == 4 and str(published(poisoned)[-1]) in result.paragraph and "is not finite" in result.paragraph, result.err
    shutil.rmtree(published(poisoned)[-1])  # as it says
    result = here("sdtrain", *SHORT, "resume=must", f"hydra.run.dir={poisoned}")
    assert result.code == 0 and same(tensors(published(poisoned)[-1]), tensors(published(whole)[-1]))


def test_unlooked_at_a_nan_in_a_checkpoint_is_called_good(here, poisoned, monkeypatch):
    """The twin: the samples are blamed, and the checkpoint is not."""
    monkeypatch.setattr(saving, "not_finite", lambda tensors: None)
    result = here("sdtrain", *SHORT, "resume=must", f"hydra.run.dir={poisoned}")
    assert result.code == 4 and "first in step 5" in result.paragraph and "the last checkpoint is good" in result.paragraph
    assert not finite(published(poisoned)[-1])


LOOKING = ["callbacks.samples.every=64", "callbacks.samples.num_images=2", "steps=2", "validation.every=64", "validation.num_images=32"]


@pytest.mark.parametrize(("owner", "name", "call", "seen", "number", "code"), [
    (DiffusionModule, "training_step", 3, 3, signal.SIGTERM, 143), (DiffusionModule, "validate", 1, 2, signal.SIGTERM, 143),
    (sample_grid, "generate", 1, 2, signal.SIGTERM, 143), (saving, "write_checkpoint", 2, None, signal.SIGTERM, 143),
    (DiffusionModule, "training_step", 3, 3, signal.SIGINT, 130),
], ids=["training", "validation", "sampling", "saving", "Ctrl-C"])
def test_a_signal_at_any_moment_ends_the_run_between_two_steps_and_it_goes_on_bit_for_bit(
    here, whole, tmp_path, monkeypatch, owner, name, call, seen, number, code,
):
    """The signal comes inside the call of that number; a save is made by a thread, while training is at one step or the next."""
    method, calls, sent = getattr(owner, name), [], []

    def signalled(*given, **named):
        calls.append(name)
        if len(calls) == call:
            sent.append(time.monotonic())
            os.kill(os.getpid(), number)
        return method(*given, **named)

    monkeypatch.setattr(owner, name, signalled)
    run = tmp_path / "run"
    result = here("sdtrain", *SHORT, *LOOKING, f"hydra.run.dir={run}")
    assert result.code == code and time.monotonic() - sent[0] < 30 and "Interrupted at" in result.out, result.err
    assert (status(run)["state"], status(run)["exit_code"]) == ("interrupted", code)
    assert status(run)["images_seen"] in ([seen * BATCH] if seen else [2 * BATCH, 3 * BATCH, 4 * BATCH])
    newest = published(run)[-1]
    assert newest.name == f"{status(run)['images_seen']:012d}" and damage(newest) is None
    assert same(tensors(newest), tensors(whole / "checkpoints" / newest.name))
    monkeypatch.undo()
    result = here("sdtrain", *SHORT, *LOOKING, "resume=must", f"hydra.run.dir={run}")
    assert result.code == 0, result.err
    assert same(tensors(published(run)[-1]), tensors(published(whole)[-1]))


SIGNALLED = """
import os, signal, threading
from pathlib import Path

from sdtrain import checkpoints
from sdtrain.callbacks.checkpoint import Checkpoints, Signals
from sdtrain.cli.train import main
from sdtrain.errors import StorageError
from sdtrain.module import DiffusionModule

rank, broken, number = os.environ.get("LOCAL_RANK", "0"), os.environ["BROKEN"], getattr(signal, os.environ["NUMBER"])
step, save_file, with_name, sent = DiffusionModule.training_step, checkpoints.save_file, Path.with_name, []


def signalled_step(self, batch, batch_index):
    if batch_index == 3 and rank == os.environ["ON"]:
        self.trainer.strategy.checkpoint_io.settle()  # the third step's checkpoint is there
        sent.append(number)
        os.kill(os.getpid(), number)
    return step(self, batch, batch_index)


def signalled_save(*given):
    save_file(*given)
    if sent and os.environ["TWICE"]:
        os.kill(os.getpid(), number)
        threading.Event().wait()  # until the main thread has ended the process


DiffusionModule.training_step, checkpoints.save_file = signalled_step, signalled_save
if broken == "deaf":
    Signals.install = lambda self: None
if broken == "agreement":
    Checkpoints.agreed = lambda self: self.signals.received
if broken == "beside":
    Path.with_name = lambda self, name: self if self.parent.name == "checkpoints" else with_name(self, name)
if __name__ == "__main__":
    main()
"""


@pytest.fixture
def signalled(tmp_path):
    """(exit code, run, stderr) of a run of its own process, that gets a signal in its fourth step, and another in the save that follows."""
    def run(*words, number="SIGTERM", on="0", twice="", broken=""):
        (tmp_path / "signalled.py").write_text(SIGNALLED)
        env = os.environ | {"NUMBER": number, "ON": on, "TWICE": twice, "BROKEN": broken, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(tmp_path / "signalled.py"), *SHORT, f"checkpoint.every={3 * BATCH}", *words, f"hydra.run.dir={tmp_path}/run"]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        return done.returncode, tmp_path / "run", done.stderr
    return run


def test_a_second_ctrl_c_in_the_midst_of_the_save_leaves_at_once_and_what_is_on_disk_is_whole(signalled, here, whole):
    code, run, said = signalled(number="SIGINT", twice="1")
    assert code == -signal.SIGINT, said
    assert [folder.name for folder in published(run)] == [f"{3 * BATCH:012d}"] and damage(published(run)[-1]) is None
    assert list((run / "checkpoints").glob(".*.tmp"))  # the save was under way
    assert here("sdtrain", *SHORT, "resume=must", f"hydra.run.dir={run}").code == 0
    assert same(tensors(published(run)[-1]), tensors(published(whole)[-1])) and not list((run / "checkpoints").glob(".*"))


def test_written_in_place_a_checkpoint_would_be_half_there(signalled):
    """The twin."""
    code, run, _ = signalled(number="SIGINT", twice="1", broken="beside")
    assert code == -signal.SIGINT and damage(published(run)[-1]) is not None


def test_unheard_a_sigterm_loses_the_steps_since_the_last_save(signalled):
    """The twin of a signal that is waited out."""
    code, run, _ = signalled(broken="deaf")
    assert code == -signal.SIGTERM and status(run)["state"] == "running" and published(run)[-1].name == f"{3 * BATCH:012d}"


def test_a_signal_to_rank_1_alone_ends_both_and_the_run_goes_on(signalled, here, whole):
    code, run, said = signalled("strategy=ddp", "trainer.devices=2", on="1")
    assert code == 143, said
    assert status(run)["state"] == "interrupted" and published(run)[-1].name == f"{4 * BATCH:012d}" and damage(published(run)[-1]) is None
    assert here("sdtrain", *SHORT, "resume=must", f"hydra.run.dir={run}").code == 0
    start, end, resumed = (
        torch.cat([value.double().flatten() for key, value in tensors(folder).items() if key.startswith("model/")])
        for folder in (published(whole)[0], published(whole)[-1], published(run)[-1])
    )
    assert (resumed - end).norm() / (end - start).norm() < 1e-4


def test_where_ranks_do_not_agree_on_a_signal_the_run_is_no_interrupted_one(signalled):
    """The twin."""
    code, run, _ = signalled("strategy=ddp", "trainer.devices=2", "strategy.timeout=10", on="1", broken="agreement")
    assert code == 6 and status(run)["state"] == "failed"


@pytest.fixture
def disk(tmp_path):
    """A file system of its own with room for four checkpoints."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=360m", "none", str(place)], capture_output=True).returncode:
        pytest.skip("file systems can be mounted by root alone")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.fixture
def full_from_step_3(disk, monkeypatch):
    """full_from_step_3(until): no byte is free on the disk from the third step to the one before `until`."""
    def patch(until=99):
        step, ballast = DiffusionModule.training_step, disk / "ballast"

        def filled(self, batch, batch_index):
            self.trainer.strategy.checkpoint_io.settle()
            if batch.stream_end == 3 * BATCH:
                fill(ballast)
            if batch.stream_end == until * BATCH:
                ballast.unlink()
            return step(self, batch, batch_index)

        monkeypatch.setattr(DiffusionModule, "training_step", filled)
    return patch


def fill(path) -> None:
    with pytest.raises(OSError, match="No space left"), open(path, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def said(result) -> list[str]:
    return [line for line in result.err.splitlines() if line.startswith("sdtrain: ")]


@pytest.mark.parametrize(("allowed", "reached"), [(3, 6), (1, 5)])
def test_on_a_full_disk_training_goes_on_the_older_checkpoints_stay_and_it_ends_with_5(here, whole, disk, full_from_step_3, allowed, reached):
    """To the end, where the last save must hold, or until too many in a row have failed."""
    full_from_step_3()
    words = ["trainer.log_every=32", f"checkpoint.max_failed_saves={allowed}"]
    result = here("sdtrain", *SHORT, *words, f"hydra.run.dir={disk}/run")
    assert result.code == 5 and "Traceback" not in result.err and f"{reached * BATCH} of {6 * BATCH} images" in result.out, result.err
    assert "hydra.run.dir" in said(result)[-1] and "MiB are free" in said(result)[-1]
    assert f"Training goes on; 1 of at most {allowed} saves in a row have failed" in result.err
    assert [folder.name for folder in published(disk / "run")] == [f"{count * BATCH:012d}" for count in (1, 2)]
    for folder in published(disk / "run"):
        assert damage(folder) is None and same(tensors(folder), tensors(whole / "checkpoints" / folder.name))
    seen = [line["images_seen"] for line in map(json.loads, (disk / "run" / "metrics.jsonl").read_text().splitlines())]
    assert seen == [32 * (place + 1) for place in range(len(seen))] and len(seen) >= 2  # as far as the last block goes, and no half a line
    assert not list((disk / "run").rglob(".*.tmp"))


def test_when_a_full_disk_has_room_again_nothing_is_missing_but_a_picture(here, whole, disk, full_from_step_3):
    full_from_step_3(until=5)
    words = ["trainer.log_every=32", "callbacks.samples.every=96", "callbacks.samples.num_images=2", "steps=2"]
    result = here("sdtrain", *SHORT, *words, f"hydra.run.dir={disk}/run")
    assert result.code == 0 and "Training goes on without this picture" in result.err, result.err
    lines = [json.loads(line) for line in (disk / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["images_seen"] for line in lines] == [32, 64, 96, 128, 160, 192] and status(disk / "run")["state"] == "finished"
    assert {path.name for path in (disk / "run" / "samples").iterdir()} == {"forward.png", "grid-000000192.png", "strip-000000192.png"}
    assert same(tensors(published(disk / "run")[-1]), tensors(published(whole)[-1])) and damage(published(disk / "run")[-1]) is None


def test_room_made_by_removing_the_older_ones_first_would_leave_none(here, disk, full_from_step_3, monkeypatch):
    """The twin of the older ones that stay."""
    write = saving.write_checkpoint

    def rash(folder, *given):
        for old in published(folder.parent.parent):
            shutil.rmtree(old)
        fill(disk / "more")  # somebody else takes the room
        write(folder, *given)

    def rash_when_full(folder, *given):
        (rash if (disk / "ballast").exists() else write)(folder, *given)

    monkeypatch.setattr(saving, "write_checkpoint", rash_when_full)
    full_from_step_3()
    assert here("sdtrain", *SHORT, f"hydra.run.dir={disk}/run").code == 5 and not published(disk / "run")


def test_lines_of_numbers_that_the_disk_refuses_wait_for_room(tmp_path, capsys):
    log, trainer = MetricsLog(every=1, run_dir=tmp_path), SimpleNamespace(is_global_zero=True, loggers=[], datamodule=SimpleNamespace(images_seen=32))
    log.started, log.path = 0.0, Path("/dev/full")
    log.report(trainer, {"train/loss": 1.0})
    assert "No space left" in capsys.readouterr().err
    with pytest.raises(StorageError, match="1 lines are lost"):
        log.on_train_end(trainer, None)
    log.path = tmp_path / "metrics.jsonl"
    log.report(trainer, {"train/loss": 2.0})
    assert [json.loads(line)["train/loss"] for line in log.path.read_text().splitlines()] == [1.0, 2.0]
    log.on_train_end(trainer, None)
