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


def test_guidance_and_steps_are_tried_at_the_end(run_of):
    run = run_of(
        "tried",
        "trainer.max_images=8",
        "validation=none",
        "callbacks.samples.guidance_scales=[1,2,3]",
        "callbacks.samples.sampler_steps=[2,3,6]",
    )
    names = {path.name for path in (run / "samples").iterdir()}
    tried = {f"{kind}-000000008.png" for kind in ("guidance", "steps", "sampler_error")}
    grid = {f"{kind}-000000008.png" for kind in ("grid", "strip", "pictures")}
    assert names == tried | grid | {"forward.png"}
    guidance = Image.open(run / "samples" / "guidance-000000008.png")
    steps = Image.open(run / "samples" / "steps-000000008.png")
    # Two pictures wide, three rows of them tall.
    assert guidance.size == steps.size and guidance.tobytes() != steps.tobytes()


def test_a_run_may_be_as_long_as_a_time(run_of):
    """And is looked at where it ends."""
    run = run_of(
        "timed",
        "trainer.max_images=1000000",
        "trainer.max_minutes=0.002",
        "lr_schedule=constant",
        "validation.every=1000000",
    )
    seen = status(run)["images_seen"]
    assert status(run)["state"] == "finished" and seen < 100_000
    assert newest(run).name == f"{seen:012d}"
    assert (run / "samples" / f"grid-{seen:09d}.png").exists()
    last = [line for line in lines(run) if line["images_seen"] == seen]
    assert lines(run)[-1] in last and any("validation/loss" in line for line in last)


def test_looks_and_loader_workers_change_no_weight_and_no_loss(run_of, tiny_run, saved):
    """Nor does where checkpoints are written: looked at often, never, and without callbacks."""
    often = ["callbacks.samples.every=16", "validation.every=16", "checkpoint.every=8"]
    assert same(saved(run_of("often", *often, "data.num_workers=2")), saved(tiny_run))
    never = ["callbacks.samples.every=0", "validation.every=0", "checkpoint.every=1000"]
    assert same(saved(run_of("never", *never)), saved(tiny_run))
    bare = run_of("bare", *BARE)
    assert same(saved(bare), without_average(saved(tiny_run)))
    for name in ("often", "never", "bare"):
        assert losses(bare.with_name(name)) == losses(tiny_run), name


def test_another_seed_gives_other_weights(run_of, tiny_run, saved):
    moved = saved(run_of("other", *BARE, "seed=1"))
    for key, value in saved(tiny_run).items():
        if key.startswith("model/") and value.ndim > 1:
            assert not torch.equal(value, moved[key]), key


def middle_of(run, folder):
    """A new run folder that holds the middle checkpoint of `run` alone."""
    middle = checkpoints(run)[0]
    shutil.copytree(middle, folder / "checkpoints" / middle.name)
    return folder


def test_resumed_in_the_middle_it_ends_in_the_same_weights(run_of, tiny_run, saved, tmp_path):
    """And in the same numbers, also where a killed run has left half a line."""
    run = middle_of(tiny_run, tmp_path / "run")
    written = (tiny_run / "metrics.jsonl").read_text().splitlines()
    before = [line for line in written if json.loads(line)["images_seen"] <= 48]
    (run / "metrics.jsonl").write_text("\n".join(before) + '\n{"images_seen": 48, "tr')
    run_of("run", "resume=must")
    assert same(saved(run), saved(tiny_run))
    assert numbers(run) == numbers(tiny_run)


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


def test_a_changed_schedule_is_refused_and_a_changed_rate_is_applied_and_listed(
    here, tiny, tiny_run, tmp_path
):
    run = middle_of(tiny_run, tmp_path / "run")
    place = ["resume=must", f"hydra.run.dir={run}"]
    result = here("sdtrain", *tiny("schedule=linear", "data.seed=4"), *place)
    assert result.code == 2
    was, now = (f"sdtrain.schedules.{name}.{name}" for name in ("scaled_linear", "linear"))
    for said in (
        f"schedule._target_: {was} -> {now}",
        "schedule.beta_end: 0.012 -> 0.02",
        "data.seed: 0 -> 4",
    ):
        assert said in result.paragraph
    other = ["optimizer.lr=0.0004", "lr_schedule=constant", "lr_schedule.warmup_images=16"]
    unseen = ["callbacks.samples.every=0", "validation.every=0"]
    result = here("sdtrain", *tiny(*other, *unseen), *place)
    assert result.code == 0, result.err
    assert "optimizer.lr: 0.001 -> 0.0004" in result.out and "lr_schedule._target_" in result.out
    rates = [line["train/lr"] for line in numbers(run) if "train/lr" in line]
    assert rates[-1] == 0.0004


def test_a_run_is_not_written_over(here, tiny, tiny_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    before = contents(run)
    result = here("sdtrain", *tiny(), f"hydra.run.dir={run}")
    assert result.code == 2
    assert "resume=auto" in result.paragraph and "hydra.run.dir" in result.paragraph
    assert contents(run) == before  # the finished run's status too


def test_the_first_line_of_a_resumed_run_is_of_all_images_since_the_last(run_of, tmp_path):
    """Also where a checkpoint lay between two lines. And the clock goes on."""
    words = [*BARE, "trainer.max_images=32", "trainer.log_every=32"]
    whole = run_of("whole", *words)
    part = tmp_path / "part" / "checkpoints" / f"{16:012d}"
    shutil.copytree(whole / "checkpoints" / part.name, part)
    (part.parent.parent / "metrics.jsonl").write_text('{"images_seen": 16, "seconds": 1000.0}\n')
    run = run_of("part", *words, "resume=must")
    assert len(losses(whole)) == 1 and losses(run) == losses(whole)
    clocks = [line["seconds"] for line in lines(run)]
    assert 1000 == clocks[0] < clocks[1] < 1060 and clocks == sorted(clocks)


def test_a_run_without_a_whole_checkpoint_is_not_written_over(here, tiny, tiny_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    for folder in checkpoints(run):
        (folder / "model.safetensors").write_bytes(b"")
    before = contents(run)
    result = here("sdtrain", *tiny("resume=auto"), f"hydra.run.dir={run}")
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


def test_what_is_trained_already_is_said(here, tiny, tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "run")
    words = tiny("trainer.max_images=32", "resume=must")
    result = here("sdtrain", *words, f"hydra.run.dir={tmp_path}/run")
    assert result.code == 0
    assert "nothing left to train: trainer.max_images=32, and 64 were seen" in result.out


def test_resume_must_wants_something_to_resume(here, tiny, tmp_path):
    for place in ([f"hydra.run.dir={tmp_path}/run"], []):
        result = here("sdtrain", *tiny("resume=must"), *place, cwd=tmp_path)
        assert result.code == 2 and "resume=must" in result.paragraph


def test_a_run_that_starts_anew_removes_what_another_left(here, tiny, tmp_path):
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
    words = tiny(*BARE, "resume=auto", "trainer.max_images=8")
    result = here("sdtrain", *words, f"hydra.run.dir={run}")
    assert result.code == 0 and "nothing to resume" in result.out
    assert mine.exists() and not any(path.exists() for path in later)


SHORT = [
    *BARE,
    "trainer.max_images=48",
    "trainer.log_every=8",
    "checkpoint.every=16",
]


@pytest.fixture(scope="module")
def straight(here, tiny, tmp_path_factory):
    """A run to which nothing happens."""
    run = tmp_path_factory.mktemp("straight") / "run"
    assert here("sdtrain", *tiny(*SHORT), f"hydra.run.dir={run}").code == 0
    return run


def assert_interrupted(run, code: int) -> None:
    left = status(run)
    assert (left["state"], left["exit_code"], left["images_seen"]) == ("interrupted", code, 24)
    assert newest(run).name == f"{24:012d}" and find_damage(newest(run)) is None


def test_stopped_by_a_signal_and_resumed_in_a_new_process(command, tiny, saved, straight, tmp_path):
    run = tmp_path / "a folder, with=signs"
    words = [*tiny(*SHORT), f"hydra.run.dir={run}"]
    sent = tmp_path / "sent"
    before = f"{mishaps.__file__}:signal_in('training', SIGTERM, {str(sent)!r})"
    result = command("sdtrain", *words, before=before)
    assert result.code == 143 and sent.exists(), result.err
    assert_interrupted(run, 143)
    result = command("sdtrain", *words, "resume=must", "data.num_workers=2")
    assert result.code == 0, result.err
    assert newest(run).name == newest(straight).name and same(saved(run), saved(straight))
    assert numbers(run) == numbers(straight) and status(run)["state"] == "finished"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGUSR1, 143)])
def test_other_signals_stop_it_too(here, tiny, tmp_path, monkeypatch, number, code):
    step = DiffusionModule.training_step

    def signalled(self, batch, batch_index):
        if batch_index == 2:
            os.kill(os.getpid(), number)
        return step(self, batch, batch_index)

    monkeypatch.setattr(DiffusionModule, "training_step", signalled)
    result = here("sdtrain", *tiny(*SHORT), f"hydra.run.dir={tmp_path}/run")
    assert result.code == code, result.err
    assert_interrupted(tmp_path / "run", code)


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
