"""What a run depends on, and what it does not: bit for bit, through interruptions."""

import hashlib
import json
import os
import shutil
import signal

import pytest
import torch
from PIL import Image
from reading import numbers, same, status

from sdtrain.commands import train as train_command
from sdtrain.config import boundary
from sdtrain.pictures import read_notes
from sdtrain.runs.manifest import find_damage, list_checkpoints


def weights(tensors: dict) -> dict:
    return {key: value for key, value in tensors.items() if key.startswith("model/")}


@pytest.fixture
def run_of(here, tiny, tmp_path):
    def run(name, *words):
        result = here("sdtrain", *tiny(*words), f"hydra.run.dir={tmp_path / name}")
        assert result.code == 0, result.err
        return tmp_path / name

    return run


def losses(run) -> list[float]:
    return [line["train/loss"] for line in numbers(run) if "train/loss" in line]


def test_a_run_leaves_what_it_says(tiny_run):
    own = {"command": "", "pid": 0, "peak_memory_mb": 0}
    assert status(tiny_run) | own == {"state": "finished", "images_seen": 64, "exit_code": 0} | own
    assert [folder.name for folder in list_checkpoints(tiny_run)] == [
        "000000000048",
        "000000000064",
    ]
    assert {path.name for path in (tiny_run / "samples").iterdir()} == {
        "forward.png",
        *(f"{kind}-{seen:09d}.png" for kind in ("grid", "strip", "pictures") for seen in (32, 64)),
    }
    lines = numbers(tiny_run)
    assert [line["images_seen"] for line in lines if "train/loss" in line] == [16, 32, 48, 64]
    assert [line["images_seen"] for line in lines if "validation/loss" in line] == [32, 64]
    config = hashlib.sha256((tiny_run / "config.yaml").read_bytes()).hexdigest()
    for kind in ("grid", "pictures"):  # they say how they were drawn
        found = read_notes(Image.open(tiny_run / "samples" / f"{kind}-000000064.png"))
        assert found["sampler"] == {"name": "ddim", "eta": 0.0}
        assert (found["steps"], found["config_sha256"]) == (2, config)
    assert not [path for path in tiny_run.rglob(".*")]


def test_guidance_and_steps_are_tried_at_the_end(run_of):
    run = run_of(
        "tried",
        "callbacks.samples.guidance_scales=[1,2,3]",
        "callbacks.samples.sampler_steps=[2,3,6]",
    )
    assert {
        path.name
        for path in (run / "samples").iterdir()
        if path.name.partition("-")[0] not in ("forward.png", "grid", "strip", "pictures")
    } == {f"{kind}-000000064.png" for kind in ("guidance", "steps", "sampler_error")}
    sheets = [
        Image.open(run / "samples" / f"{kind}-000000064.png") for kind in ("guidance", "steps")
    ]
    assert (
        sheets[0].size == sheets[1].size and sheets[0].tobytes() != sheets[1].tobytes()
    )  # two pictures wide, three rows of them tall


def test_a_run_may_be_as_long_as_a_time(run_of):
    run = run_of(
        "timed",
        "trainer.max_images=1000000",
        "trainer.max_minutes=0.02",
        "lr_schedule=constant",
        "validation.every=1000000",
    )
    seen, lines = status(run)["images_seen"], numbers(run)
    assert (
        status(run)["state"] == "finished"
        and seen < 100_000
        and list_checkpoints(run)[-1].name == f"{seen:012d}"
    )
    at_the_end = set().union(*(line for line in lines if line["images_seen"] == seen))
    assert (
        lines[-1]["images_seen"] == seen
        and "validation/loss" in at_the_end
        and (run / "samples" / f"grid-{seen:09d}.png").exists()
    )


def test_the_same_seed_gives_the_same_weights_and_another_does_not(run_of, tiny_run, saved):
    again, other = run_of("again"), run_of("other", "seed=1")
    assert same(saved(again), saved(tiny_run)) and numbers(again) == numbers(tiny_run)
    moved = weights(saved(other))
    assert not any(
        torch.equal(value, moved[key])
        for key, value in weights(saved(tiny_run)).items()
        if value.ndim > 1
    )


@pytest.mark.parametrize(
    "words",
    [
        ["callbacks.samples.every=16", "validation.every=16", "checkpoint.every=8"],
        ["callbacks.samples.every=0", "validation.every=0", "checkpoint.every=1000"],
        ["data.num_workers=2"],
    ],
    ids=["looking often", "never looking", "loader workers"],
)
def test_looking_and_workers_change_no_weight(run_of, tiny_run, saved, words):
    assert same(saved(run_of("other", *words)), saved(tiny_run))


def test_callbacks_change_no_weight(run_of, tiny_run, saved):
    bare = saved(run_of("bare", "callbacks=none", "validation=none"))
    full = {key: value for key, value in saved(tiny_run).items() if not key.startswith("ema/")}
    assert same(bare, full)


def middle_of(run, folder):
    """A new run folder that holds the middle checkpoint of `run` alone."""
    shutil.copytree(
        list_checkpoints(run)[0], folder / "checkpoints" / list_checkpoints(run)[0].name
    )
    return folder


def test_resumed_in_the_middle_it_ends_in_the_same_weights(run_of, tiny_run, saved, tmp_path):
    middle_of(tiny_run, tmp_path / "resumed")
    resumed = run_of("resumed", "resume=must")
    assert same(saved(resumed), saved(tiny_run))
    assert numbers(resumed) == [line for line in numbers(tiny_run) if line["images_seen"] > 48]


@pytest.mark.slow
def test_resumed_from_other_weights_it_does_not(run_of, tiny_run, saved, tmp_path):
    """The twin: one element of the average, and one moment of the optimizer, reach the end."""
    from sdtrain.runs.checkpoint import read_trainer, read_weights, write_checkpoint

    for part in ("ema", "optimizer"):
        folder = list_checkpoints(middle_of(tiny_run, tmp_path / part))[0]
        model, ema, state = (
            read_weights(folder, "model"),
            read_weights(folder, "ema"),
            read_trainer(folder),
        )
        moved = (
            next(iter(ema.values()))
            if part == "ema"
            else state["optimizer_states"][0]["state"][0]["exp_avg"]
        )
        moved.view(-1)[0] += 1
        write_checkpoint(folder, model, ema, state, (folder / "config.yaml").read_text())
        end = saved(run_of(part, "resume=must"))
        changed = {
            key.partition("/")[0]
            for key, value in saved(tiny_run).items()
            if not torch.equal(value, end[key])
        }
        assert changed == ({"ema"} if part == "ema" else {"model", "ema", "optimizer"})


def test_a_changed_schedule_is_refused_and_a_changed_rate_is_applied_and_listed(
    here, tiny, tiny_run, tmp_path
):
    run = middle_of(tiny_run, tmp_path / "run")
    result = here(
        "sdtrain", *tiny("resume=must", "schedule=linear", "data.seed=4"), f"hydra.run.dir={run}"
    )
    assert result.code == 2
    was, now = (f"sdtrain.schedules.{name}.{name}" for name in ("scaled_linear", "linear"))
    for said in (
        f"schedule._target_: {was} -> {now}",
        "schedule.beta_end: 0.012 -> 0.02",
        "data.seed: 0 -> 4",
    ):
        assert said in result.paragraph
    result = here(
        "sdtrain",
        *tiny(
            "resume=must",
            "optimizer.lr=0.0004",
            "lr_schedule=constant",
            "lr_schedule.warmup_images=16",
        ),
        f"hydra.run.dir={run}",
    )
    assert result.code == 0, result.err
    assert "optimizer.lr: 0.001 -> 0.0004" in result.out and "lr_schedule._target_" in result.out
    rates = [line["train/lr"] for line in numbers(run) if "train/lr" in line]
    assert rates[-1] == 0.0004


def test_a_run_is_not_written_over(here, tiny, tiny_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    result = here("sdtrain", *tiny(), f"hydra.run.dir={run}")
    assert (
        result.code == 2
        and "resume=auto" in result.paragraph
        and "hydra.run.dir" in result.paragraph
    )
    assert {path: path.read_bytes() for path in before} == before  # the finished run's status too


def test_the_first_line_of_a_resumed_run_is_of_all_images_since_the_last(run_of, tmp_path):
    """Also where a checkpoint lay between two lines."""
    whole = run_of("whole", "trainer.log_every=64")
    part = tmp_path / "part" / "checkpoints" / f"{48:012d}"
    shutil.copytree(whole / "checkpoints" / part.name, part)
    (part.parent.parent / "metrics.jsonl").write_text('{"images_seen": 48, "seconds": 1000.0}\n')
    run = run_of("part", "trainer.log_every=64", "resume=must")
    assert losses(run) == losses(whole)
    clocks = [
        json.loads(line)["seconds"] for line in (run / "metrics.jsonl").read_text().splitlines()
    ]
    assert 1000 == clocks[0] < clocks[1] < 1060 and clocks == sorted(clocks)  # the clock goes on


def test_a_run_without_a_whole_checkpoint_is_not_written_over(here, tiny, tiny_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    for folder in list_checkpoints(run):
        (folder / "model.safetensors").write_bytes(b"")
    before = {
        path: path.read_bytes()
        for path in run.rglob("*")
        if path.is_file() and path.name not in ("status.json", "error.log")
    }
    for resume in ("auto", "must"):
        result = here("sdtrain", *tiny(f"resume={resume}"), f"hydra.run.dir={run}")
        assert (
            result.code == 5
            and f"resume={resume}, but none of the 2 checkpoints" in result.paragraph
            and "is skipped: " in result.out
        )
    assert all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.parametrize("guarded", [True, False])
def test_one_process_is_rank_0_whatever_has_started_it(here, tiny, tmp_path, monkeypatch, guarded):
    """As a task of a scheduler's that is no rank of ours. And the twin, which holds no lock and
    leaves nothing to be seen of it.
    """
    monkeypatch.setenv("SLURM_PROCID", "1")
    if not guarded:
        monkeypatch.setattr(train_command, "rank_for_config", lambda devices, **_: 1)
    assert (
        here(
            "sdtrain",
            *tiny("trainer.max_images=8", "callbacks.samples.every=0"),
            f"hydra.run.dir={tmp_path}/run",
        ).code
        == 0
    )
    assert (tmp_path / "run" / "status.json").exists() == guarded


def test_two_processes_of_torchrun_want_a_strategy(here, tiny, tmp_path, monkeypatch):
    for name, value in {
        "TORCHELASTIC_RUN_ID": "x",
        "WORLD_SIZE": "2",
        "RANK": "0",
        "LOCAL_RANK": "0",
    }.items():
        monkeypatch.setenv(name, value)
    result = here("sdtrain", *tiny(), f"hydra.run.dir={tmp_path}/run")
    assert result.code == 2 and "strategy=ddp trainer.devices=2" in result.paragraph


def full_stdout(guarded: bool) -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    if not guarded:
        boundary.secure_streams = lambda: None


@pytest.mark.slow
@pytest.mark.parametrize("guarded", [True, False])
def test_a_stdout_that_cannot_be_written_ends_no_run(
    command, tiny, saved, tiny_run, tmp_path, guarded
):
    result = command(
        "sdtrain",
        *tiny(),
        f"hydra.run.dir={tmp_path}/run",
        before=f"{__file__}:full_stdout({guarded})",
    )
    assert (result.code == 0) == guarded
    if guarded:
        assert (
            result.err.count("stdout cannot be written (No space left on device)") == 1
            and "Traceback" not in result.err
        )
        assert (
            same(saved(tmp_path / "run"), saved(tiny_run))
            and status(tmp_path / "run")["state"] == "finished"
        )


def test_what_is_trained_already_is_said(here, tiny, tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "run")
    result = here(
        "sdtrain", *tiny("trainer.max_images=32", "resume=must"), f"hydra.run.dir={tmp_path}/run"
    )
    assert (
        result.code == 0
        and "nothing left to train: trainer.max_images=32, and 64 were seen" in result.out
    )


def test_resume_must_wants_something_to_resume(here, tiny, tmp_path):
    result = here("sdtrain", *tiny("resume=must"), f"hydra.run.dir={tmp_path}/run")
    assert result.code == 2 and "resume=must" in result.paragraph
    result = here("sdtrain", *tiny("resume=must"), cwd=tmp_path)
    assert result.code == 2 and "resume=must" in result.paragraph
    later = [
        tmp_path / "run" / name
        for name in ("validation/000000000064.json", "samples/pictures-000000064.png")
    ]  # of a process that got further
    mine = tmp_path / "run" / "samples" / "of-mine.png"
    for path in (*later, mine):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    result = here(
        "sdtrain", *tiny("resume=auto", "trainer.max_images=8"), f"hydra.run.dir={tmp_path}/run"
    )
    assert (
        result.code == 0
        and "nothing to resume" in result.out
        and mine.exists()
        and not any(path.exists() for path in later)
    )


def test_a_line_that_a_killed_run_left_half_written_is_no_obstacle(
    run_of, tiny_run, saved, tmp_path
):
    run = middle_of(tiny_run, tmp_path / "run")
    lines = (tiny_run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(lines[:4]) + '\n{"images_seen": 48, "tr')
    assert same(saved(run_of("run", "resume=must")), saved(tiny_run))
    assert numbers(run)[-2:] == numbers(tiny_run)[-2:]


LONGER = [
    "trainer.max_images=160",
    "trainer.log_every=8",
    "callbacks.samples.every=0",
    "validation.every=0",
    "checkpoint.every=32",
]


@pytest.fixture(scope="module")
def straight(here, tiny, tmp_path_factory):
    run = tmp_path_factory.mktemp("straight") / "run"
    assert here("sdtrain", *tiny(*LONGER), f"hydra.run.dir={run}").code == 0
    return run


def stopped(start, tiny, run, number, at=48, words=(), cwd=None):
    """A run of its own process that gets a signal when it has seen `at` images or a few more."""
    running = start("sdtrain", *tiny(*LONGER, *words), cwd=cwd)
    running.until(
        lambda: any(
            metrics.stat().st_size and numbers(metrics.parent)[-1]["images_seen"] >= at
            for metrics in run.glob("**/metrics.jsonl")
        )
    )
    os.kill(running.pid, number)
    return running.wait()


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, 143),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, 143, marks=pytest.mark.slow),
    ],
)
def test_stopped_by_a_signal_and_resumed_in_a_new_process(
    start, command, tiny, saved, straight, tmp_path, number, code
):
    run = tmp_path / "a folder, with=signs"
    result = stopped(start, tiny, tmp_path, number, words=[f"hydra.run.dir={run}"])
    assert result.code == code, result.err
    seen = status(run)["images_seen"]
    assert (
        status(run)["state"] == "interrupted"
        and status(run)["exit_code"] == code
        and 48 <= seen < 160
    )
    assert (
        list_checkpoints(run)[-1].name == f"{seen:012d}"
        and find_damage(list_checkpoints(run)[-1]) is None
    )
    result = command(
        "sdtrain", *tiny(*LONGER, "resume=must", "data.num_workers=2"), f"hydra.run.dir={run}"
    )
    assert result.code == 0, result.err
    assert str(list_checkpoints(straight)[-1].name) == list_checkpoints(run)[-1].name and same(
        saved(run), saved(straight)
    )
    assert numbers(run) == numbers(straight) and status(run)["state"] == "finished"


@pytest.mark.slow
def test_killed_and_found_again_without_its_folder(start, command, tiny, saved, straight, tmp_path):
    assert stopped(start, tiny, tmp_path, signal.SIGKILL, cwd=tmp_path).code == -signal.SIGKILL
    (run,) = (tmp_path / "runs" / "shapes").iterdir()
    assert status(run)["state"] == "running" and list_checkpoints(run)
    result = command("sdtrain", *tiny(*LONGER, "resume=auto"), cwd=tmp_path)
    assert result.code == 0 and "Resuming from" in result.out, result.err
    assert len(list((tmp_path / "runs" / "shapes").iterdir())) == 1
    assert same(saved(run), saved(straight)) and not list(run.rglob("checkpoints/.*"))
    assert numbers(run) == numbers(straight)
