"""What a run depends on, and what it does not: bit for bit, through interruptions."""

import hashlib
import itertools
import json
import os
import shutil
import signal

import mishaps
import pytest
import torch
from PIL import Image
from reading import BARE, checkpoints, lines, newest, numbers, same, status

from sdtrain.commands import train as train_command
from sdtrain.config import boundary
from sdtrain.pictures import read_notes
from sdtrain.runs.checkpoint import read_trainer, read_weights, write_checkpoint
from sdtrain.runs.manifest import find_damage
from sdtrain.training.diffusion_module import DiffusionModule


def without_average(found: dict) -> dict:
    return {key: value for key, value in found.items() if not key.startswith("ema/")}


def losses(run) -> list[float]:
    return [line["train/loss"] for line in lines(run) if "train/loss" in line]


def contents(folder) -> dict:
    """The bytes of every file in it."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_leaves_what_it_says(tiny_run):
    left = status(tiny_run)
    wanted = {"state": "finished", "images_seen": 64, "exit_code": 0}
    assert left.keys() - wanted.keys() == {"command", "pid", "peak_memory_mb"}
    assert {key: left[key] for key in wanted} == wanted
    assert [folder.name for folder in checkpoints(tiny_run)] == ["000000000048", "000000000064"]
    pictures = {"forward.png"}
    for kind, seen in itertools.product(("grid", "strip", "pictures"), (32, 64)):
        pictures.add(f"{kind}-{seen:09d}.png")
    assert {path.name for path in (tiny_run / "samples").iterdir()} == pictures
    found = numbers(tiny_run)
    assert [line["images_seen"] for line in found if "train/loss" in line] == [16, 32, 48, 64]
    assert [line["images_seen"] for line in found if "validation/loss" in line] == [32, 64]
    config = hashlib.sha256((tiny_run / "config.yaml").read_bytes()).hexdigest()
    for kind in ("grid", "pictures"):  # they say how they were drawn
        notes = read_notes(Image.open(tiny_run / "samples" / f"{kind}-000000064.png"))
        assert notes["sampler"] == {"name": "ddim", "eta": 0.0}
        assert (notes["steps"], notes["config_sha256"]) == (2, config)
    assert not list(tiny_run.rglob(".*"))


@pytest.fixture(scope="module")
def timed(train_tiny, tmp_path_factory):
    """A run that ends by its time, and whose last look tries other guidance and other steps."""
    run = tmp_path_factory.mktemp("timed") / "run"
    result = train_tiny(
        run,
        "trainer.max_images=1000000",
        "trainer.max_minutes=0.002",
        "lr_schedule=constant",
        "validation.every=1000000",
        "callbacks.samples.every=1000000",
        "callbacks.samples.guidance_scales=[1,2,3]",
        "callbacks.samples.sampler_steps=[2,3,6]",
    )
    assert result.code == 0, result.err
    return run


def test_guidance_and_steps_are_tried_at_the_end(timed):
    seen = status(timed)["images_seen"]
    names = {path.name for path in (timed / "samples").iterdir()}
    tried = {f"{kind}-{seen:09d}.png" for kind in ("guidance", "steps", "sampler_error")}
    grid = {f"{kind}-{seen:09d}.png" for kind in ("grid", "strip", "pictures")}
    assert names == tried | grid | {"forward.png"}
    guidance = Image.open(timed / "samples" / f"guidance-{seen:09d}.png")
    steps = Image.open(timed / "samples" / f"steps-{seen:09d}.png")
    # Two pictures wide, three rows of them tall.
    assert guidance.size == steps.size and guidance.tobytes() != steps.tobytes()


def test_a_run_may_be_as_long_as_a_time(timed):
    """And is looked at where it ends."""
    seen = status(timed)["images_seen"]
    assert status(timed)["state"] == "finished" and seen < 100_000
    assert newest(timed).name == f"{seen:012d}"
    assert (timed / "samples" / f"grid-{seen:09d}.png").exists()
    last = [line for line in lines(timed) if line["images_seen"] == seen]
    assert lines(timed)[-1] in last and any("validation/loss" in line for line in last)


def test_looks_and_loader_workers_change_no_weight_and_no_loss(run_of, tiny_run, straight, saved):
    """Nor does where checkpoints are written: looked at twice, never, and without callbacks."""
    never = ["callbacks.samples.every=0", "validation.every=0", "checkpoint.every=1000"]
    unseen = run_of("never", *never, "data.num_workers=2")
    assert same(saved(unseen), saved(tiny_run))
    assert losses(unseen) == losses(tiny_run)
    assert same(saved(straight), without_average(saved(tiny_run)))


def test_another_seed_gives_other_weights_and_another_first_batch(planned, built, tiny_config):
    networks = []
    batches = []
    for seed in (0, 1):
        parts = built(planned(config=tiny_config(*BARE, f"seed={seed}")))
        networks.append(dict(parts.module.model.unet.named_parameters()))
        batches.append(next(iter(parts.datamodule.train_dataloader())))
    for name, value in networks[0].items():
        if value.ndim > 1 and value.any():  # the last layer begins at zero
            assert not torch.equal(value, networks[1][name]), name
    for name in ("image", "noise", "u", "drop"):
        assert not torch.equal(getattr(batches[0], name), getattr(batches[1], name)), name


def middle_of(run, folder):
    """A new run folder that holds the middle checkpoint of `run` alone."""
    middle = checkpoints(run)[0]
    shutil.copytree(middle, folder / "checkpoints" / middle.name)
    return folder


def test_resumed_in_the_middle_it_ends_in_the_same_weights(run_of, tiny_run, saved, tmp_path):
    """And in the same numbers, also where a killed run has left half a line. Its clock goes on."""
    run = middle_of(tiny_run, tmp_path / "run")
    before = [line for line in lines(tiny_run) if line["images_seen"] <= 48]
    before[-1]["seconds"] = 1000.0
    written = "".join(json.dumps(line) + "\n" for line in before)
    (run / "metrics.jsonl").write_text(written + '{"images_seen": 48, "tr')
    run_of("run", "resume=must")
    assert same(saved(run), saved(tiny_run))
    assert numbers(run) == numbers(tiny_run)
    clocks = [line["seconds"] for line in lines(run) if line["images_seen"] > 48]
    assert clocks == sorted(clocks) and 1000 < clocks[0] <= clocks[-1] < 1060


@pytest.mark.slow
@pytest.mark.parametrize("part", ["ema", "optimizer"])
def test_resumed_from_other_weights_it_does_not(run_of, tiny_run, saved, tmp_path, part):
    """The twin: one element of the average, and one moment of the optimizer, reach the end."""
    folder = checkpoints(middle_of(tiny_run, tmp_path / part))[0]
    model = read_weights(folder, "model")
    ema = read_weights(folder, "ema")
    state = read_trainer(folder)
    moments = state["optimizer_states"][0]["state"][0]["exp_avg"]
    moved = next(iter(ema.values())) if part == "ema" else moments
    moved.view(-1)[0] += 1
    write_checkpoint(folder, model, ema, state, (folder / "config.yaml").read_text())
    end = saved(run_of(part, "resume=must", "callbacks.samples.every=0", "validation.every=0"))
    changed = set()
    for key, value in saved(tiny_run).items():
        if not torch.equal(value, end[key]):
            changed.add(key.partition("/")[0])
    assert changed == ({"ema"} if part == "ema" else {"model", "ema", "optimizer"})


def test_a_run_is_not_written_over(train_tiny, tiny_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    before = contents(run)
    result = train_tiny(run)
    assert result.code == 2
    assert "resume=auto" in result.paragraph and "hydra.run.dir" in result.paragraph
    assert contents(run) == before  # the finished run's status too


def test_a_run_without_a_whole_checkpoint_is_not_written_over(train_tiny, tiny_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    for folder in checkpoints(run):
        (folder / "model.safetensors").write_bytes(b"")
    before = contents(run)
    result = train_tiny(run, "resume=auto")
    assert result.code == 5
    assert "resume=auto, but none of the 2 checkpoints" in result.paragraph
    assert "is skipped: " in result.out
    after = contents(run)
    of_this_try = {run / "status.json", run / "error.log"}
    assert {path for path in before if after.get(path) != before[path]} <= of_this_try


@pytest.mark.parametrize("guarded", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_one_process_is_rank_0_whatever_has_started_it(here, tiny, tmp_path, monkeypatch, guarded):
    """As a task of a scheduler's that is no rank of ours. And the twin, which holds no lock and
    leaves nothing to be seen of it.
    """
    monkeypatch.setenv("SLURM_PROCID", "1")
    if not guarded:
        monkeypatch.setattr(train_command, "rank_for_config", lambda devices, **_: 1)
    words = tiny(*BARE, "trainer.max_images=8")
    result = here("sdtrain", *words, f"hydra.run.dir={tmp_path}/run")
    assert result.code == 0, result.err
    assert (tmp_path / "run" / "status.json").exists() == guarded


def test_two_processes_of_torchrun_want_a_strategy(here, tiny, tmp_path, monkeypatch):
    torchrun = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
    for name, value in torchrun.items():
        monkeypatch.setenv(name, value)
    result = here("sdtrain", *tiny(), f"hydra.run.dir={tmp_path}/run")
    assert result.code == 2 and "strategy=ddp trainer.devices=2" in result.paragraph


def full_stdout(guarded: bool) -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    if not guarded:
        boundary.secure_streams = lambda: None


@pytest.mark.slow
@pytest.mark.parametrize("guarded", [True, False])
def test_a_stdout_that_cannot_be_written_ends_no_run(command, tiny, tmp_path, guarded):
    """And the twin, which it ends."""
    run = tmp_path / "run"
    words = [*tiny(*BARE, "trainer.max_images=16"), f"hydra.run.dir={run}"]
    result = command("sdtrain", *words, before=f"{__file__}:full_stdout({guarded})")
    assert (result.code == 0) == guarded
    if guarded:
        said = "stdout cannot be written (No space left on device)"
        assert result.err.count(said) == 1 and "Traceback" not in result.err
        assert status(run)["state"] == "finished" and find_damage(newest(run)) is None


def test_what_is_trained_already_is_said(train_tiny, tiny_run, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    result = train_tiny(run, "trainer.max_images=32", "resume=must")
    assert result.code == 0
    assert "nothing left to train: trainer.max_images=32, and 64 were seen" in result.out
    names = [line.split()[0] for line in result.out.partition("finished:")[2].splitlines()[1:]]
    assert "checkpoint" in names and "result" not in names  # nothing was measured


def test_a_run_that_starts_anew_removes_what_another_left(train_tiny, tmp_path):
    """Numbers and pictures of a process that got further, and nothing of the user's."""
    run = tmp_path / "run"
    later = [
        run / "validation" / "000000000064.json",
        run / "samples" / "pictures-000000064.png",
    ]
    mine = run / "samples" / "of-mine.png"
    for path in (*later, mine):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    result = train_tiny(run, *BARE, "resume=auto", "trainer.max_images=8")
    assert result.code == 0 and "nothing to resume" in result.out
    assert mine.exists() and not any(path.exists() for path in later)


SHORT = [
    *BARE,
    "trainer.log_every=32",
]
"""A run of eight steps, of which one line tells four, with a checkpoint after every second."""


@pytest.fixture(scope="module")
def straight(train_tiny, tmp_path_factory):
    """A run to which nothing happens."""
    run = tmp_path_factory.mktemp("straight") / "run"
    result = train_tiny(run, *SHORT)
    assert result.code == 0, result.err
    return run


def assert_interrupted(run, code: int) -> None:
    left = status(run)
    assert (left["state"], left["exit_code"], left["images_seen"]) == ("interrupted", code, 24)
    assert newest(run).name == f"{24:012d}" and find_damage(newest(run)) is None


@pytest.fixture
def stopped_by(train_tiny, tmp_path, monkeypatch):
    """stopped_by(SIGNAL, CODE) -> the folder of a run that got it in its third step, and left with
    that code."""

    def stopped(number: int, code: int):
        run = tmp_path / "a folder, with=signs"
        step = DiffusionModule.training_step

        def signalled(self, batch, batch_index):
            if batch_index == 2:
                os.kill(os.getpid(), number)
            return step(self, batch, batch_index)

        with monkeypatch.context() as patch:
            patch.setattr(DiffusionModule, "training_step", signalled)
            result = train_tiny(run, *SHORT)
        assert result.code == code, result.err
        assert_interrupted(run, code)
        return run

    return stopped


def test_stopped_by_a_signal_and_resumed_it_is_the_same_run(
    stopped_by, train_tiny, saved, straight
):
    """The first line after that is of all images since the last, those before the stop too. In
    processes of their own: tests/training/test_resume.py."""
    run = stopped_by(signal.SIGTERM, 143)
    result = train_tiny(run, *SHORT, "resume=must", "data.num_workers=2")
    assert result.code == 0, result.err
    assert losses(run) == losses(straight) and len(losses(run)) == 2
    assert newest(run).name == newest(straight).name and same(saved(run), saved(straight))
    assert numbers(run) == numbers(straight) and status(run)["state"] == "finished"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGUSR1, 143)])
def test_other_signals_stop_it_too(stopped_by, number, code):
    stopped_by(number, code)


@pytest.mark.slow
def test_killed_and_found_again_without_its_folder(command, tiny, saved, straight, tmp_path):
    before = f"{mishaps.__file__}:signal_in_step_4(SIGKILL)"
    result = command("sdtrain", *tiny(*SHORT), cwd=tmp_path, before=before)
    assert result.code == -signal.SIGKILL
    (run,) = (tmp_path / "runs" / "shapes").iterdir()
    assert status(run)["state"] == "running" and newest(run).name == f"{16:012d}"
    result = command("sdtrain", *tiny(*SHORT, "resume=auto"), cwd=tmp_path)
    assert result.code == 0 and "Resuming from" in result.out, result.err
    assert len(list((tmp_path / "runs" / "shapes").iterdir())) == 1
    assert same(saved(run), saved(straight)) and not list(run.rglob("checkpoints/.*"))
    assert numbers(run) == numbers(straight)
