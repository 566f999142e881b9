"""A sweep is refused before any of its arms begins, and then leaves nothing behind."""

import json
import shutil
import subprocess
import sys

import pytest
from omegaconf.errors import OmegaConfBaseException

from sdtrain.config.boundary import as_user_error
from sdtrain.config.compose import known_keys
from sdtrain.errors import UserError
from sdtrain.runs.lock import FolderHeldError
from sdtrain.sweep.check import make_arms
from sdtrain.sweep.launcher import run_sweep
from sdtrain.sweep.launcher_settings import LauncherSettings

HOLDER = """
import pathlib, sys
from sdtrain.runs.lock import hold_lock
with hold_lock(pathlib.Path(sys.argv[1]), print):
    print("holds", flush=True)
    input()
"""


def files(folder) -> list:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("sweep=schedules,weightings", "names several sweeps"),
        ("modifiers=[shift,shift],[clip]", "modifiers names shift twice"),
        ("seed=0,1 seed=0", "seed is set twice"),
        ("seed=0,1 hydra.run.dir=here", "Set hydra.sweep.dir"),
        ("seed=0,1 --cfg job", "--cfg and --info show one run"),
        ("seed=0,1 hydra.sweep.dir=", "hydra.sweep.dir= is empty"),
        ("optimizer.lr=interval(0,1)", "Write them out: optimizer.lr=value,value"),
    ],
)
def test_words_that_a_sweep_cannot_follow_are_refused(here, tmp_path, words, reason):
    """Before Hydra composes anything."""
    result = here("sdtrain", "-m", *words.split(), cwd=tmp_path)
    assert result.code == 2
    assert reason in result.paragraph
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("seeed=0,1", "There is no key 'seeed'"),
        pytest.param("schedule=linear,cosin", "schedule=cosin", marks=pytest.mark.slow),
        pytest.param("hydra.launcher.parrallel=2 seed=0,1", "parrallel", marks=pytest.mark.slow),
        ("sweep=schedules schedule=linear", "sweep=schedules varies schedule"),
    ],
)
def test_a_refused_sweep_of_the_command_writes_nothing(here, tiny, tmp_path, words, reason):
    """A key and an option that do not exist, a setting of the launcher, and an arm too few."""
    result = here("sdtrain", "-m", *tiny(*words.split()), cwd=tmp_path)
    assert result.code == 2
    assert reason in result.paragraph
    # Hydra's own record goes with the process.
    assert {path.name for path in files(tmp_path)} <= {"multirun.yaml"}


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({"parallel": "x"}, 'hydra.launcher.parallel="x"'),
        ({"parallel": 0}, "hydra.launcher.parallel=0"),
        ({"prefix": "nowhere"}, "no command 'nowhere'"),
        ({"prefix": '"a'}, "No closing quotation"),
        ({"devices": {}}, "hydra.launcher.devices"),
    ],
)
def test_places_where_no_arm_could_run_are_refused(setting, reason):
    with pytest.raises(UserError) as refused:
        LauncherSettings(**setting).check()
    (name,) = setting
    assert refused.value.key == f"hydra.launcher.{name}"
    assert reason in str(refused.value)


@pytest.mark.parametrize(
    ("words", "typed", "reason"),
    [
        (
            "schedule=table schedule.beta_end=0.1",
            "schedule=linear,table",
            "-m schedule=linear and the same hydra.sweep.dir",
        ),
        (
            "callbacks=none callbacks.samples.num_images=2",
            "callbacks=default,none",
            "Not every option of callbacks=default,none has the key callbacks.samples.num_images, "
            "but default has it",
        ),
        ("schedule=linear schedule.betaz=1", "schedule=linear,table", "There is no key"),
    ],
)
def test_a_key_that_only_some_options_have_is_named_with_them(composed, words, typed, reason):
    with pytest.raises(Exception) as raised:
        composed(*words.split())
    error = raised.value
    assert isinstance(error.__cause__ or error, OmegaConfBaseException)
    _, other = words.split()
    refusal = as_user_error(error, lambda: known_keys("train"), [typed, other])
    assert refusal.key == other.partition("=")[0]
    assert reason in str(refusal)


@pytest.mark.parametrize(
    ("bad", "good", "key"),
    [
        ("schedule=flow", "schedule=linear", "prediction"),
        ("optimizer.lr=x", "optimizer.lr=0.1", "optimizer.lr"),
        ("optimizer.lr=-1", "optimizer.lr=0.1", "optimizer.lr"),
        ("trainer.max_images=many", "trainer.max_images=8", "trainer.max_images"),
        ("trainer.max_images=-8", "trainer.max_images=8", "trainer.max_images"),
        ("looks.share=2", "looks.share=0.5", "looks.share"),
    ],
)
def test_an_arm_that_no_run_could_be_is_named(precheck, tmp_path, bad, good, key):
    with pytest.raises(UserError) as refused:
        make_arms(precheck(tmp_path / "swept", good, bad))
    assert refused.value.key == key
    assert f"In the arm {bad}: " in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_two_arms_of_one_configuration_are_refused(precheck, tmp_path):
    with pytest.raises(UserError, match="have the same configuration") as refused:
        make_arms(precheck(tmp_path / "swept", "optimizer.lr=0.0001", "optimizer.lr=0.00010"))
    assert refused.value.key == "hydra.sweeper.params"


def test_a_sweep_without_arms_is_refused(precheck, tmp_path):
    """As seed=glob(*) leaves it."""
    with pytest.raises(UserError, match="has no arms"):
        precheck(tmp_path)


def test_the_folder_of_a_run_takes_no_sweep(precheck, tiny_run):
    with pytest.raises(UserError, match="is the folder of a run") as refused:
        precheck(tiny_run, "seed=0", "seed=1")
    assert refused.value.key == "hydra.sweep.dir"


def test_a_sweep_that_is_under_way_is_left_alone(precheck, tmp_path):
    folder = tmp_path / "swept"
    folder.mkdir()
    command = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "holds\n"
        with pytest.raises(FolderHeldError) as refused:
            run_sweep(precheck(folder, "seed=0", "seed=1"))
        holder.communicate("\n")
    assert refused.value.key == "hydra.sweep.dir"
    assert not files(folder)


def test_a_folder_of_runs_with_another_budget_is_left_alone(precheck, tiny_run, tmp_path):
    """Else one arm would have what others have not, and the last number of a run that was longer
    would pass for that of a shorter one."""
    shutil.copytree(tiny_run, tmp_path / "seed=0")
    arms = [f"seed={seed} trainer.max_images=32" for seed in (0, 1)]
    changed = r"holds a run with another configuration \(trainer.max_images: 64 -> 32\)"
    with pytest.raises(UserError, match=changed) as refused:
        run_sweep(precheck(tmp_path, *arms))
    assert refused.value.key == "trainer.max_images"
    assert not (tmp_path / "sweep.json").exists()
    assert not (tmp_path / "seed=1").exists()


def test_a_run_of_an_earlier_version_is_taken_for_the_arm_that_it_is(
    precheck, tiny_run, tmp_path, capsys
):
    """Its config.yaml names classes as they were called then. The other arm's command leaves
    before the arm has finished, and is not believed."""
    arm = tmp_path / "seed=0"
    shutil.copytree(tiny_run, arm)
    config = (arm / "config.yaml").read_text()
    renamed = config.replace("sdtrain.training.optimisation.", "sdtrain.optimisation.")
    renamed = renamed.replace("sdtrain.config.schema.", "sdtrain.cli.trainer.")
    assert renamed.count("sdtrain.optimisation.") == renamed.count("sdtrain.cli.trainer.") == 1
    (arm / "config.yaml").write_text(renamed)
    before = (arm / "status.json").stat().st_mtime_ns
    with pytest.raises(SystemExit) as left:
        run_sweep(precheck(tmp_path, "seed=0", "seed=1", prefix="echo"))
    assert left.value.code == 1
    printed = capsys.readouterr().out
    assert "seed=0: finished earlier" in printed
    assert (arm / "status.json").stat().st_mtime_ns == before
    assert "seed=1: not finished" in printed
    assert "Set hydra.launcher.prefix" in printed
    assert "1 of 2 arms are finished" in printed


def test_arms_that_cannot_start_are_named_and_earlier_arms_stay_in_the_record(
    precheck, tmp_path, capsys
):
    record = tmp_path / "sweep.json"
    record.write_text(json.dumps({"command": [], "arms": ["earlier"]}))
    for seed in (0, 1):
        (tmp_path / f"seed={seed}").touch()
    with pytest.raises(SystemExit) as left:
        run_sweep(precheck(tmp_path, "seed=0", "seed=1"))
    assert left.value.code == 5
    said = capsys.readouterr()
    assert "seed=0: cannot start: File exists" in said.out
    assert "Not finished: seed=0 (5), seed=1 (5)" in said.err
    assert json.loads(record.read_text())["arms"] == ["earlier", "seed=0", "seed=1"]


def test_a_place_that_cannot_be_made_is_the_sweeps(here, tiny):
    result = here("sdtrain", "-m", *tiny("seed=0,1", "hydra.sweep.dir=/proc/x"))
    assert result.code == 5
    assert "Set hydra.sweep.dir to another place" in result.paragraph
