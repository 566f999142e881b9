"""Sweeps: what their arms are called, and that they end in the same runs however they were stopped."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from sdtrain.config.overrides import is_sweep
from sdtrain.paths import config_dir
from sdtrain.sweep.arms import Arm, names, prefixed
from sdtrain.sweep.launcher import RECORD, ProcessLauncher, earlier_sweep, same_sweep


@pytest.mark.parametrize(
    ("jobs", "found"),
    [
        (
            [["schedule=linear", "seed=0"], ["schedule=cosine", "seed=0"]],
            ["schedule=linear", "schedule=cosine"],
        ),
        (
            [["schedule=linear", "+x=1"], ["schedule=cosine", "+x=2"]],
            ["schedule=linear,x=1", "schedule=cosine,x=2"],
        ),
        ([["prompt='a/b c'"], ["prompt='a/b d'"]], ["prompt=a_b_c", "prompt=a_b_d"]),
        ([["a='x y'"], ["a='x/y'"]], ["0_a=x_y", "1_a=x_y"]),
        ([["schedule=linear"]], ["0"]),
        ([["a=" + "x" * 200], ["a=" + "y" * 200]], ["0_a=" + "x" * 78, "1_a=" + "y" * 78]),
        (
            [
                [
                    f"model.unet.norm_groups={i}",
                    f"callbacks.noise_levels.num_images={i}",
                    f"lr_schedule.warmup_images={i}",
                ]
                for i in (8, 9)
            ],
            [f"norm_groups={i},num_images={i},warmup_images={i}" for i in (8, 9)],
        ),
        ([["modifiers=[]"], ["modifiers=[shift]"]], ["modifiers=", "modifiers=shift"]),
    ],
)
def test_arms_are_called_by_what_differs(jobs, found):
    assert names(jobs) == found


def test_a_sweep_is_found_again_by_its_words(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["-m", "schedule=linear,cosine", "hydra.launcher.parallel=2"]
    folder = tmp_path / "runs" / "shapes" / "then"
    folder.mkdir(parents=True)
    (folder / "sweep.json").write_text(
        json.dumps({"command": [*words, "hydra/launcher=process", "hydra.sweep.dir=x"], "arms": []})
    )
    assert (
        earlier_sweep(words) == folder and earlier_sweep(["schedule=linear,cosine", "-m"]) == folder
    )
    (tmp_path / "runs" / "a").mkdir()
    folder = folder.rename(tmp_path / "runs" / "a" / "b")  # a name may have slashes
    assert earlier_sweep(words) == folder
    assert earlier_sweep([*words, "seed=1"]) is None and same_sweep(words) == [
        "-m",
        "schedule=linear,cosine",
    ]
    (folder / "sweep.json").write_text("[")
    assert earlier_sweep(words) is None


def test_places_for_arms():
    arms = [type("Arm", (), {"cfg": {"trainer": {"devices": 1, "accelerator": "cpu"}}})] * 3
    for given, slots in [
        ({}, [None]),
        ({"parallel": 2}, [None] * 2),
        ({"prefix": "srun"}, [None] * 3),
        ({"devices": ["0,1", "2,3"]}, ["0,1", "2,3"]),
        ({"devices": ["0", "1"], "parallel": 1}, ["0"]),
    ]:
        assert ProcessLauncher(**given)._slots(arms) == slots


@pytest.mark.parametrize(
    "path", sorted((config_dir() / "sweep").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_arm_of_a_sweep_that_is_offered_can_be_built(path, composed):
    from sdtrain.assemble.model import fitting_objective

    params = ((yaml.safe_load(path.read_text()) or {}).get("hydra") or {"sweeper": {"params": {}}})[
        "sweeper"
    ]["params"]
    for key, values in params.items():
        for value in values.split(","):
            constant = [
                f"{other}={given}"
                for other, given in params.items()
                if other != key and "," not in given
            ]
            cfg = composed(*constant, f"{key}={value}")
            if value in ("x0", "flow", "v") or key != "weighting":
                fitting_objective(cfg, {key, *(word.partition("=")[0] for word in constant)}, [])


def test_what_ssh_makes_one_line_of_still_finds_its_folder_and_its_words(tmp_path, monkeypatch):
    """A stand-in that forgets all but PATH and the folder, as the real one does; and a scheduler, which takes words as they are."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "ssh").write_text(
        f'#!/bin/sh\nshift\ncd {tmp_path}/elsewhere\nexec env -i PATH="$PATH" sh -c "$*"\n'
    )
    (tmp_path / "ssh").chmod(0o755)
    (tmp_path / "a folder").mkdir()
    monkeypatch.chdir(tmp_path / "a folder")
    command = [
        sys.executable,
        "-c",
        "import os, sys; print(os.getcwd(), os.environ.get('WANDB_RUN_GROUP'), sys.argv[1:])",
        "a 'b' $c",
        "d=[1, 2]",
    ]
    for prefix, group in (
        (f"{tmp_path}/ssh host", "then"),
        ("env -u WANDB_RUN_GROUP", None),
        ("", "then"),
    ):
        environment = os.environ | {"WANDB_RUN_GROUP": "then"}
        said = subprocess.run(
            prefixed(prefix, command, environment),
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert said == f"{tmp_path}/a folder {group} {command[3:]}\n"


def test_a_sweep_still_hears_a_signal_after_the_first_stage_of_its_arms(tmp_path, monkeypatch):
    heard, launcher, before = [], ProcessLauncher(), signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(
        "sdtrain.training.first_stage.train_first_stage",
        lambda cfg, words, folder, signals: heard.append(signals) or 0,
    )
    arm = Arm("a", tmp_path / "a", [], {"first_stage": {"experiment": "x"}, "data": {}})
    launcher._share_first_stage(tmp_path, [arm])
    assert (
        heard == [launcher.signals]
        and signal.getsignal(signal.SIGTERM) is before
        and "model.autoencoder.path=" in arm.words[0]
    )


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (-9, "killed, perhaps because memory was short"),
        (143, "interrupted"),
        (3, "data.path=x is missing."),
        (1, "see {folder}/output.txt"),
    ],
)
def test_why_an_arm_has_left(tmp_path, code, said):
    arm = Arm("a", tmp_path, [], {"name": "shapes"}, code=code)
    (tmp_path / "output.txt").write_text(
        "sdtrain: shapes  \n  data  1\n"
        + ("sdtrain: data.path=x is missing.\n" if code == 3 else "")
    )
    assert arm.said() == said.format(folder=tmp_path)


def test_no_sweep_is_a_run():
    assert is_sweep(["sweep=schedules"]) and not any(
        map(is_sweep, (["sweep=none"], ["sweep=null"], ["seed=1"]))
    )


def test_the_group_is_the_sweeps_folder_wherever_the_command_was_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "sdtrain.sweep.arms.prefixed",
        lambda prefix, command, environment: ["echo", environment["WANDB_RUN_GROUP"]],
    )
    arm = Arm("a", Path("a"), [], {})
    arm.start("")
    arm.process.wait()
    assert (tmp_path / "a" / "output.txt").read_text() == f"{tmp_path.name}\n"


def test_a_sweep_is_evaluated_arm_by_arm(here, tiny_run, tmp_path):
    (tmp_path / "a").symlink_to(tiny_run)
    (tmp_path / RECORD).write_text(json.dumps({"command": [], "arms": ["a", "b"]}))
    words = [
        "sdtrain-evaluate",
        f"checkpoint={tmp_path}",
        "num_images=2",
        "steps=2",
        f"output={tmp_path}/out",
    ]
    result = here(*words)
    assert result.code == 0 and re.search("b\nno checkpoint", result.out), result.err
    (tmp_path / "c" / "checkpoints" / "000000000008").mkdir(parents=True)
    (tmp_path / RECORD).write_text(json.dumps({"command": [], "arms": ["c", "a"]}))
    result = here(*words)
    assert (
        result.code == 2
        and "c could not be evaluated" in result.paragraph
        and "not evaluated" in result.out
        and "colour" in result.out
    )
    assert (
        json.loads((tmp_path / "out" / "a" / "evaluation.json").read_text())["prompt_accuracy"]
        and not (tmp_path / "out" / "b").exists()
    )


def sweep(tmp_path, *words, wait=True, env=None):
    """The command in a folder of its own, and what it left with and said."""
    command = [sys.executable, "-m", "sdtrain.commands.train", *words]
    given = {
        "cwd": tmp_path,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
        "env": os.environ | {"OMP_NUM_THREADS": "1"} | (env or {}),
    }
    process = subprocess.Popen(command, **given)
    return (process.communicate(timeout=300)[0], process.returncode) if wait else process


def states(tmp_path) -> dict[str, str]:
    return {
        path.parent.name: json.loads(path.read_text())["state"]
        for path in tmp_path.glob("runs/*/*/*/status.json")
    }


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("seeed=0,1", "There is no key 'seeed'"),
        ("schedule=linear,cosin", "schedule=cosin"),
        ("trainer.max_images=8,many", "trainer.max_images"),
        ("schedule=linear,flow", "In the arm schedule=flow: prediction=epsilon"),
        ("hydra.launcher.parrallel=2 seed=0,1", "parrallel"),
        ("hydra.launcher.parallel=x seed=0,1", 'hydra.launcher.parallel="x"'),
        ("hydra.launcher.parallel=0 seed=0,1", "Give 1 or more"),
        ("hydra.launcher.prefix=nowhere seed=0,1", "no command 'nowhere'"),
        ("hydra.launcher.prefix='\"a' seed=0,1", "cannot be read: No closing quotation"),
        ("hydra.launcher.devices={} seed=0,1", "hydra.launcher.devices"),
        ("optimizer.lr=0.1,x", "it should be a valid number. Change optimizer.lr"),
        (
            "sweep=schedules schedule=linear",
            "sweep=schedules varies schedule, and schedule=linear leaves a single arm",
        ),
        ("seed=glob(*)", "The sweep has no arm"),
        ("sweep=schedules,weightings", "names several sweeps"),
        ("seed=0,1 seed=0", "seed is given twice"),
        (
            "optimizer.lr=0.001,-1",
            "In the arm optimizer.lr=-1: optimizer: Invalid learning rate: -1. Change optimizer.lr.",
        ),
        (
            "trainer.max_images=8,-8",
            "In the arm trainer.max_images=-8: trainer.max_images=-8 must be at least 1",
        ),
        ("callbacks.noise_levels.share=1,2", "callbacks.noise_levels.share=2 must lie in"),
        ("data.batch_size=8,9 trainer.accumulate=2", "data.batch_size=9"),
        ("optimizer.lr=1e-4,0.0001", "have the same configuration"),
        ("seed=0,1 hydra.run.dir=here", "Set hydra.sweep.dir"),
        ("seed=0,1 --cfg job", "--cfg and --info show one run"),
        ("seed=0,1 hydra.sweep.dir=", "hydra.sweep.dir= is empty"),
        ("optimizer.lr=interval(0,1)", "Write them out, optimizer.lr=value,value"),
        (
            "callbacks=default,none",
            "There is no key 'callbacks.samples.num_images' here: an option that was chosen leaves it out",
        ),
    ],
)
def test_what_no_arm_could_do_fails_before_any_begins(here, tiny, tmp_path, word, said):
    result = here("sdtrain", "-m", *tiny(*word.split()), cwd=tmp_path)
    assert result.code == 2 and said in result.err and not states(tmp_path)
    assert not [
        path for path in tmp_path.rglob("*") if path.is_file() and path.name != "multirun.yaml"
    ]  # that goes with the process


def test_a_refused_sweep_leaves_nothing_and_a_prefix_may_hold_any_sign(command, tiny, tmp_path):
    words = ("schedule=linear,flow", "hydra.launcher.prefix=env --unset=A", "hydra.sweep.dir=here")
    result = command("sdtrain", "-m", *tiny(*words), cwd=tmp_path)
    assert (
        result.code == 2
        and "In the arm schedule=flow" in result.err
        and not list(tmp_path.iterdir())
    )


def test_the_folder_of_something_else_takes_no_sweep(here, tiny, tiny_run, tmp_path):
    (tmp_path / RECORD).write_text('{"foo": 1}')
    result = here("sdtrain", "-m", *tiny("seed=0,1", f"hydra.sweep.dir={tmp_path}"))
    assert (
        result.code == 2
        and "is no record of a sweep" in result.paragraph
        and (tmp_path / RECORD).read_text() == '{"foo": 1}'
    )
    result = here("sdtrain", "-m", *tiny("seed=0,1", f"hydra.sweep.dir={tiny_run}"))
    assert (
        result.code == 2
        and "is the folder of a run. Choose another hydra.sweep.dir." in result.paragraph
        and not (tiny_run / RECORD).exists()
    )


def test_a_sweep_that_is_under_way_is_left_alone(here, tiny, tmp_path):
    (tmp_path / "swept").mkdir()
    other = "import sys, pathlib; from sdtrain.runs.lock import only_run\nwith only_run(pathlib.Path(sys.argv[1]), print): print('holds', flush=True), input()"
    with subprocess.Popen(
        [sys.executable, "-c", other, str(tmp_path / "swept")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout.readline() == "holds\n"
        result = here("sdtrain", "-m", *tiny("seed=0,1", f"hydra.sweep.dir={tmp_path}/swept"))
        holder.communicate("\n")
    assert (
        result.code == 2
        and "under way" in result.paragraph
        and "another hydra.sweep.dir" in result.paragraph
        and not list(tmp_path.glob("*/*/status.json"))
    )


def test_arms_that_cannot_start_are_named_and_an_earlier_sweep_in_the_folder_stays_in_the_record(
    here, tiny, tmp_path
):
    (tmp_path / RECORD).write_text(json.dumps({"command": [], "arms": ["earlier"]}))
    for seed in (0, 1):
        (tmp_path / f"seed={seed}").touch()
    result = here("sdtrain", "-m", *tiny("seed=0,1", f"hydra.sweep.dir={tmp_path}"))
    assert (
        result.code == 5
        and "seed=0: cannot start: File exists" in result.out
        and "Not finished: seed=0 (5), seed=1 (5)" in result.err
    )
    assert json.loads((tmp_path / RECORD).read_text())["arms"] == ["earlier", "seed=0", "seed=1"]


def test_a_folder_of_runs_with_another_budget_is_left_alone(here, tiny, tiny_run, tmp_path):
    """Else one arm would have what others have not, and the last word of a run that was longer would pass for that of a shorter one."""
    shutil.copytree(tiny_run, tmp_path / "seed=0")
    result = here(
        "sdtrain", "-m", *tiny("seed=0,1", "trainer.max_images=32", f"hydra.sweep.dir={tmp_path}")
    )
    assert (
        result.code == 2
        and "holds a run with another configuration (trainer.max_images: 64 -> 32)"
        in result.paragraph
    )
    assert not (tmp_path / RECORD).exists() and not (tmp_path / "seed=1").exists()


def test_a_command_that_leaves_before_its_arm_has_finished_is_not_believed(here, tiny, tmp_path):
    result = here(
        "sdtrain",
        "-m",
        *tiny("seed=0,1", f"hydra.sweep.dir={tmp_path}", "hydra.launcher.prefix=echo"),
    )
    assert (
        result.code == 1
        and "0 of 2 arms are finished" in result.out
        and "Give a hydra.launcher.prefix that waits" in result.out
    )


def test_a_place_that_cannot_be_made_is_the_sweeps(here, tiny):
    result = here("sdtrain", "-m", *tiny("seed=0,1", "hydra.sweep.dir=/proc/x"))
    assert result.code == 5 and "Set hydra.sweep.dir to another place" in result.paragraph


@pytest.mark.slow
def test_a_failed_arm_is_reported_while_others_go_on_and_the_same_command_finishes_the_rest(
    tiny, tmp_path
):
    words = ["-m", *tiny("optimizer.lr=0.001,1e30", "callbacks.samples.every=0")]
    said, code = sweep(tmp_path, *words)
    assert code == 4 and states(tmp_path) == {
        "optimizer.lr=0.001": "finished",
        "optimizer.lr=1e+30": "diverged",
    }, said
    assert (
        "optimizer.lr=1e+30: left with 4 after" in said
        and "The loss or the gradient was not finite" in said
    )
    assert "Not finished: optimizer.lr=1e+30 (4)" in said and "1 of 2 arms are finished" in said
    (done,) = tmp_path.glob("runs/*/*/optimizer.lr=0.001/status.json")
    before = done.stat().st_mtime_ns
    said, code = sweep(tmp_path, *words)
    assert (
        code == 4
        and "optimizer.lr=0.001: done before" in said
        and done.stat().st_mtime_ns == before
    )
    assert len(list(tmp_path.glob("runs/shapes/*"))) == 1


@pytest.mark.slow
def test_two_arms_of_two_ranks_one_killed_and_finished_by_the_same_command(tiny, saved, tmp_path):
    """With wandb offline: two runs, two folders, in one group."""
    words = [
        "-m",
        "schedule=linear,cosine",
        "hydra.launcher.parallel=2",
        *tiny(
            "strategy=ddp",
            "trainer.devices=2",
            "logger=wandb",
            "trainer.max_images=320",
            "callbacks.samples.every=0",
            "callbacks.noise_levels.every=0",
        ),
    ]
    running = sweep(tmp_path, *words, wait=False, env={"WANDB_MODE": "offline"})
    try:
        arm = None
        while arm is None or not list(arm.parent.glob("checkpoints/[0-9]*/manifest.json")):
            arm = next(iter(tmp_path.glob("runs/*/*/schedule=cosine/status.json")), None)
            assert running.poll() is None
            time.sleep(0.02)
        os.kill(json.loads(arm.read_text())["pid"], signal.SIGKILL)
        said = running.communicate(timeout=300)[0]
        assert (
            running.returncode == 137
            and states(tmp_path)["schedule=linear"] == "finished"
            and "schedule=cosine: left with -9" in said
        ), said
        said, code = sweep(tmp_path, *words, env={"WANDB_MODE": "offline"})
        assert (
            code == 0
            and set(states(tmp_path).values()) == {"finished"}
            and "schedule=linear: done before" in said
        ), said
    finally:
        with contextlib.suppress(ProcessLookupError):
            running.kill()
    for name in ("linear", "cosine"):
        (folder,) = tmp_path.glob(f"runs/*/*/schedule={name}")
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [line["images_seen"] for line in lines if "train/loss" in line] == list(
            range(16, 321, 16)
        )
        files = list(folder.glob("wandb/offline-run-*/run-*.wandb"))
        assert len({re.search("run-([^.]+)", file.name)[1] for file in files}) == 1 and len(
            files
        ) == (1 if name == "linear" else 2)


@pytest.mark.slow
def test_an_interrupted_sweep_goes_on_to_the_same_weights(tiny, saved, tmp_path):
    words = [
        "-m",
        "seed=0,1",
        *tiny(
            "trainer.max_images=320",
            "callbacks.samples.every=0",
            "callbacks.noise_levels.every=0",
            "validation.every=0",
        ),
    ]
    (tmp_path / "straight").mkdir()
    assert sweep(tmp_path / "straight", *words)[1] == 0
    running = sweep(tmp_path, *words, wait=False)
    while not list(tmp_path.glob("runs/*/*/seed=0/checkpoints/[0-9]*/manifest.json")):
        assert running.poll() is None
        time.sleep(0.02)
    running.send_signal(signal.SIGHUP)
    said = running.communicate(timeout=300)[0]
    assert (
        running.returncode == 143
        and "the same command goes on" in said
        and "seed=1: starts" not in said
    )
    assert sweep(tmp_path, *words)[1] == 0
    for seed in (0, 1):
        ours, theirs = (
            saved(next(folder.glob(f"runs/*/*/seed={seed}")))
            for folder in (tmp_path, tmp_path / "straight")
        )
        assert all(value.equal(theirs[key]) for key, value in ours.items())
