"""A sweep is refused before any of its arms begins, and then leaves nothing behind."""

import json
import shutil
import subprocess
import sys

import pytest

HOLDER = """
import pathlib, sys
from sdtrain.runs.lock import hold_lock
with hold_lock(pathlib.Path(sys.argv[1]), print):
    print("holds", flush=True)
    input()
"""


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("seeed=0,1", "There is no key 'seeed'"),
        ("schedule=linear,cosin", "schedule=cosin"),
        ("trainer.max_images=8,many", "trainer.max_images"),
        ("schedule=linear,flow", "In the arm schedule=flow: prediction=epsilon"),
        ("hydra.launcher.parrallel=2 seed=0,1", "parrallel"),
        ("hydra.launcher.parallel=x seed=0,1", 'hydra.launcher.parallel="x"'),
        ("hydra.launcher.parallel=0 seed=0,1", "hydra.launcher.parallel=0"),
        ("hydra.launcher.prefix=nowhere seed=0,1", "no command 'nowhere'"),
        ("hydra.launcher.prefix='\"a' seed=0,1", "No closing quotation"),
        ("hydra.launcher.devices={} seed=0,1", "hydra.launcher.devices"),
        ("optimizer.lr=0.1,x", "it should be a valid number. Change optimizer.lr"),
        (
            "sweep=schedules schedule=linear",
            "sweep=schedules varies schedule, but schedule=linear leaves a single arm",
        ),
        ("seed=glob(*)", "The sweep has no arm"),
        ("sweep=schedules,weightings", "names several sweeps"),
        (
            "schedule=linear,table schedule.betas=[0.1,0.2]",
            "-m schedule=table and the same hydra.sweep.dir",
        ),
        ("schedule=linear,table schedule.betaz=1", "There is no key 'schedule.betaz'"),
        ("modifiers=[shift,shift],[clip]", "modifiers names shift twice"),
        ("seed=0,1 seed=0", "seed is set twice"),
        (
            "optimizer.lr=0.001,-1",
            "In the arm optimizer.lr=-1: optimizer.lr=-1 must be at least 0.",
        ),
        (
            "trainer.max_images=8,-8",
            "In the arm trainer.max_images=-8: trainer.max_images=-8 must be at least 1",
        ),
        ("looks.share=0.5,2", "looks.share=2 must lie in"),
        ("data.batch_size=8,9 trainer.accumulate=2", "data.batch_size=9"),
        ("optimizer.lr=1e-4,0.0001", "have the same configuration"),
        ("seed=0,1 hydra.run.dir=here", "Set hydra.sweep.dir"),
        ("seed=0,1 --cfg job", "--cfg and --info show one run"),
        ("seed=0,1 hydra.sweep.dir=", "hydra.sweep.dir= is empty"),
        ("optimizer.lr=interval(0,1)", "Write them out: optimizer.lr=value,value"),
        (
            "callbacks=default,none",
            "Not every option of callbacks=default,none has the key callbacks.samples.num_images, "
            "but default has it",
        ),
    ],
)
def test_what_no_arm_could_do_is_refused_before_any_begins(here, tiny, tmp_path, word, reason):
    result = here("sdtrain", "-m", *tiny(*word.split()), cwd=tmp_path)
    assert result.code == 2
    assert reason in result.err
    for path in tmp_path.rglob("*"):
        # Hydra's own record goes with the process.
        assert path.is_dir() or path.name == "multirun.yaml"


@pytest.mark.parametrize(
    "word", ["trainer.max_images=8,-8", "data.batch_size=8,9 trainer.accumulate=2", "seed=0,x"]
)
def test_what_needs_no_torch_is_refused_without_it(tmp_path, word):
    code = (
        "import sys\n"
        "from sdtrain.commands.train import main\n"
        "try:\n    main()\n"
        "except SystemExit as left:\n    print(left.code, 'torch' in sys.modules)\n"
    )
    command = [sys.executable, "-c", code, "-m", *word.split()]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ended.stdout == "2 False\n", ended.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_refused_sweep_leaves_nothing_and_a_prefix_may_hold_any_sign(command, tiny, tmp_path):
    words = ("schedule=linear,flow", "hydra.launcher.prefix=env --unset=A", "hydra.sweep.dir=here")
    result = command("sdtrain", "-m", *tiny(*words), cwd=tmp_path)
    assert result.code == 2
    assert "In the arm schedule=flow" in result.err
    assert not list(tmp_path.iterdir())


def test_the_folder_of_something_else_takes_no_sweep(here, tiny, tiny_run, tmp_path):
    record = tmp_path / "sweep.json"
    record.write_text('{"foo": 1}')
    result = here("sdtrain", "-m", *tiny("seed=0,1", f"hydra.sweep.dir={tmp_path}"))
    assert result.code == 2
    assert "sweep.json is not" in result.paragraph
    assert record.read_text() == '{"foo": 1}'
    result = here("sdtrain", "-m", *tiny("seed=0,1", f"hydra.sweep.dir={tiny_run}"))
    assert result.code == 2
    assert "is the folder of a run. Choose another hydra.sweep.dir." in result.paragraph
    assert not (tiny_run / "sweep.json").exists()


def test_a_sweep_that_is_under_way_is_left_alone(here, tiny, tmp_path):
    folder = tmp_path / "swept"
    folder.mkdir()
    command = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "holds\n"
        result = here("sdtrain", "-m", *tiny("seed=0,1", f"hydra.sweep.dir={folder}"))
        holder.communicate("\n")
    assert result.code == 2
    assert "already running" in result.paragraph
    assert "another hydra.sweep.dir" in result.paragraph
    assert not list(folder.glob("*/status.json"))


def test_a_folder_of_runs_with_another_budget_is_left_alone(here, tiny, tiny_run, tmp_path):
    """Else one arm would have what others have not, and the last number of a run that was longer
    would pass for that of a shorter one."""
    shutil.copytree(tiny_run, tmp_path / "seed=0")
    words = tiny("seed=0,1", "trainer.max_images=32", f"hydra.sweep.dir={tmp_path}")
    result = here("sdtrain", "-m", *words)
    assert result.code == 2
    changed = "holds a run with another configuration (trainer.max_images: 64 -> 32)"
    assert changed in result.paragraph
    assert not (tmp_path / "sweep.json").exists()
    assert not (tmp_path / "seed=1").exists()


def test_a_run_of_an_earlier_version_is_taken_for_the_arm_that_it_is(
    here, tiny, tiny_run, tmp_path
):
    """Its config.yaml names classes as they were called then."""
    arm = tmp_path / "seed=0"
    shutil.copytree(tiny_run, arm)
    config = (arm / "config.yaml").read_text()
    renamed = config.replace("sdtrain.training.optimisation.", "sdtrain.optimisation.")
    renamed = renamed.replace("sdtrain.config.schema.", "sdtrain.cli.trainer.")
    assert renamed.count("sdtrain.optimisation.") == renamed.count("sdtrain.cli.trainer.") == 1
    (arm / "config.yaml").write_text(renamed)
    words = tiny("seed=0,1", f"hydra.sweep.dir={tmp_path}", "hydra.launcher.prefix=echo")
    result = here("sdtrain", "-m", *words)
    assert "seed=0: finished earlier" in result.out, result.err
    assert "seed=1: not finished" in result.out


def test_arms_that_cannot_start_are_named_and_earlier_arms_stay_in_the_record(here, tiny, tmp_path):
    record = tmp_path / "sweep.json"
    record.write_text(json.dumps({"command": [], "arms": ["earlier"]}))
    for seed in (0, 1):
        (tmp_path / f"seed={seed}").touch()
    result = here("sdtrain", "-m", *tiny("seed=0,1", f"hydra.sweep.dir={tmp_path}"))
    assert result.code == 5
    assert "seed=0: cannot start: File exists" in result.out
    assert "Not finished: seed=0 (5), seed=1 (5)" in result.err
    assert json.loads(record.read_text())["arms"] == ["earlier", "seed=0", "seed=1"]


def test_a_command_that_leaves_before_its_arm_has_finished_is_not_believed(here, tiny, tmp_path):
    words = tiny("seed=0,1", f"hydra.sweep.dir={tmp_path}", "hydra.launcher.prefix=echo")
    result = here("sdtrain", "-m", *words)
    assert result.code == 1
    assert "0 of 2 arms are finished" in result.out
    assert "Set hydra.launcher.prefix" in result.out


def test_a_place_that_cannot_be_made_is_the_sweeps(here, tiny):
    result = here("sdtrain", "-m", *tiny("seed=0,1", "hydra.sweep.dir=/proc/x"))
    assert result.code == 5
    assert "Set hydra.sweep.dir to another place" in result.paragraph
