"""Where arms run, how they are started, and what is said of those that have left."""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from reading import with_option
from wandb.sdk.launch.sweeps.utils import (
    create_sweep_command,
    create_sweep_command_args,
    load_sweep_config,
)

from sdtrain.config.compose import compose_config
from sdtrain.config.flags import read_flags
from sdtrain.config.precheck import precheck_config
from sdtrain.evaluation.noise_level_error import BITS, LEVELS
from sdtrain.paths import config_dir
from sdtrain.runs.layout import RunFolder, SweepFolder
from sdtrain.signals import Signals
from sdtrain.sweep.arms import Arm, add_prefix
from sdtrain.sweep.launcher import (
    device_slots,
    handling_signals,
    share_first_stage,
    summarize,
)
from sdtrain.sweep.launcher_settings import LauncherSettings
from sdtrain.training.child import CHECKED, SCRIPT, check_arm_digest
from sdtrain.training.first_stage import first_stage_words
from sdtrain.training.plan import make_plan

OFFERED = sorted((config_dir() / "sweep").glob("*.yaml"))


def test_what_an_agent_of_wandb_starts_is_accepted(composed):
    """The words that wandb's own functions make of the yaml, one of each value."""
    sweep = load_sweep_config(str(config_dir() / "wandb_sweep.yaml"))
    program, *words = create_sweep_command(sweep["command"])
    assert program == sweep["program"] == "sdtrain"
    for key, parameter in sweep["parameters"].items():
        for value in parameter["values"]:
            made = create_sweep_command_args({"args": {key: {"value": value}}})
            place = words.index("${args_no_hyphens}")
            typed = [*words[:place], *made["args_no_hyphens"], *words[place + 1 :]]
            *others, option = typed
            config = with_option(composed(*others), option)
            plan = make_plan(precheck_config(config, typed))
            assert plan.config[key]["_target_"].endswith(f".{value}")
            assert plan.config["logger"]["_target_"].endswith(".wandb")


def test_places_for_arms():
    configs = [{"trainer": {"devices": 1, "accelerator": "cpu"}}] * 3
    for places, devices in [
        (LauncherSettings(), [None]),
        (LauncherSettings(parallel=2), [None] * 2),
        (LauncherSettings(prefix="srun"), [None] * 3),
        (LauncherSettings(devices=["0,1", "2,3"]), ["0,1", "2,3"]),
        (LauncherSettings(devices=["0", "1"], parallel=1), ["0"]),
    ]:
        assert device_slots(places, configs) == devices


@pytest.mark.parametrize("path", OFFERED, ids=lambda path: path.stem)
def test_every_arm_of_a_sweep_that_is_offered_can_be_built(path, composed):
    """Of one that varies options of one group."""
    node = yaml.safe_load(path.read_text()) or {"hydra": {"sweeper": {"params": {}}}}
    params = node["hydra"]["sweeper"]["params"]
    constant = [f"{key}={value}" for key, value in params.items() if "," not in value]
    varied = [f"{key}={value}" for key, value in params.items() if "," in value]
    assert len(varied) == (0 if path.stem == "none" else 1)
    for word in varied:
        key, _, values = word.partition("=")
        for value in values.split(","):
            option = f"{key}={value}"
            words = [*constant, option]
            if option == "sampler=euler_ancestral":  # which sets the grid too
                config = composed(*words)
            else:
                config = with_option(composed(*constant), option)
            make_plan(precheck_config(config, words))


def test_an_option_that_is_one_node_is_put_into_a_configuration_as_hydra_does(composed):
    """What the tests above rely on."""
    for word in ("schedule=linear", "weighting=min_snr"):
        assert with_option(composed(), word) == composed(word)


def test_ssh_keeps_the_folder_and_the_words(tmp_path, monkeypatch):
    """A stand-in that forgets all but PATH and the folder, as the real one does; and a scheduler,
    which takes words as they are."""
    (tmp_path / "elsewhere").mkdir()
    stand_in = tmp_path / "ssh"
    stand_in.write_text(
        f'#!/bin/sh\nshift\ncd {tmp_path}/elsewhere\nexec env -i PATH="$PATH" sh -c "$*"\n'
    )
    stand_in.chmod(0o755)
    (tmp_path / "a folder").mkdir()
    monkeypatch.chdir(tmp_path / "a folder")
    code = "import os, sys; print(os.getcwd(), os.environ.get('WANDB_RUN_GROUP'), sys.argv[1:])"
    words = ["a 'b' $c", "d=[1, 2]"]
    environment = os.environ | {"WANDB_RUN_GROUP": "then"}
    for prefix, group in (
        (f"{stand_in} host", "then"),
        ("env -u WANDB_RUN_GROUP", None),
        ("", "then"),
    ):
        command = add_prefix(prefix, [sys.executable, "-c", code, *words], environment)
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert ended.stdout == f"{tmp_path}/a folder {group} {words}\n"


def test_a_sweep_still_hears_a_signal_after_the_first_stage_of_its_arms(tmp_path, monkeypatch):
    heard = []
    monkeypatch.setattr(
        "sdtrain.sweep.launcher.train_first_stage",
        lambda config, words, folder, signals: heard.append(signals) or 0,
    )
    config = {"first_stage": {"experiment": "x"}, "data": {}, "model": {"autoencoder": {}}}
    arm = Arm("a", RunFolder(tmp_path / "a"), [], config)
    before = signal.getsignal(signal.SIGTERM)
    signals = Signals()
    with handling_signals(signals):
        share_first_stage(SweepFolder(tmp_path), [arm], signals)
        assert heard == [signals]
        assert signal.getsignal(signal.SIGTERM) is signals
    assert signal.getsignal(signal.SIGTERM) is before
    assert arm.arguments == [f"model.autoencoder.path='{tmp_path}/first_stage/autoencoder'"]


@pytest.mark.parametrize("other", [{"first_stage": None}, {"data": {"size": 1}}])
def test_arms_of_other_data_share_no_first_stage(tmp_path, other):
    config = {"first_stage": {"experiment": "x"}, "data": {}}
    arms = []
    for name, own in (("a", config), ("b", config | other)):
        arms.append(Arm(name, RunFolder(tmp_path / name), [], own))
    share_first_stage(SweepFolder(tmp_path), arms, Signals())
    assert [arm.arguments for arm in arms] == [[], []]


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (-9, "killed, perhaps because memory ran out"),
        (143, "interrupted"),
        (3, "data.path=x is missing."),
        (1, "see {folder}/output.txt"),
    ],
)
def test_why_an_arm_has_left(tmp_path, code, reason):
    output = "sdtrain: what an earlier process has printed\n"
    arm = Arm("a", RunFolder(tmp_path), [], {"name": "shapes"}, exit_code=code)
    arm.earlier_output = len(output)
    output += "sdtrain: shapes  \n  data  1\n"
    if code == 3:
        output += "sdtrain: data.path=x is missing.\n"
    (tmp_path / "output.txt").write_text(output)
    assert arm.failure_reason() == reason.format(folder=tmp_path)


def test_a_sweep_ends_with_the_lines_of_its_report(tmp_path, here, capsys):
    """Of arms whose number over all levels says the contrary: the wider schedule has less of it."""
    folder = SweepFolder(tmp_path)
    arms = []
    for name, reach, scale in (("wide", 12, 0.6), ("narrow", 4, 0.5)):
        arm = Arm(name, folder.arm(name), [], {}, exit_code=0)
        write_arm(arm.run, reach, scale)
        arms.append(arm)
    folder.record.write_text(json.dumps({"command": [], "arms": ["wide", "narrow"]}))
    summarize(folder, arms, Signals())
    *ranking, last = capsys.readouterr().out.splitlines()
    report = here("sdtrain-report", str(tmp_path)).out.splitlines()
    assert ranking == report[:2] and ranking[0].startswith("1. narrow: ")
    assert arms[0].bits_per_dimension() < arms[1].bits_per_dimension()
    assert last.startswith("2 of 2 arms are finished")


def write_arm(run: RunFolder, reach: int, scale: float) -> None:
    """A finished run whose error is `scale` of the linear denoiser's, from -reach to reach."""
    linear = LEVELS.sigmoid()
    inside = LEVELS.abs() <= reach
    errors = torch.where(inside, scale, 1.0) * linear
    look = {
        "images_seen": 8,
        "log_snr": LEVELS.tolist(),
        "inside": inside.tolist(),
        "pictures": ["p", "q"],
        "autoencoder": "a",
        "latent_scale": 1.0,
        "mean": [0.0],
        "variance": [1.0],
        "linear": [linear.tolist()] * 2,
        "errors": {"raw": [errors.tolist()] * 2},
    }
    run.validation.mkdir(parents=True)
    run.config.write_text(f"name: {run.name}\n")
    run.status.write_text(json.dumps({"state": "finished", "exit_code": 0, "images_seen": 8}))
    run.validation_record(8).write_text(json.dumps(look))
    measured = {"images_seen": 8, "seconds": 1.0, "validation/bits_per_dim": (errors @ BITS).item()}
    run.metrics.write_text(json.dumps(measured) + "\n")


def test_an_arm_is_a_run_of_its_own_to_wandb(tmp_path, monkeypatch):
    """Its group is the folder of the sweep, wherever the command was given, or the user's."""
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "print_wandb"
    script.write_text("#!/bin/sh\nenv | grep ^WANDB_ | grep -v -e _MODE -e _DIR | sort\n")
    script.chmod(0o755)
    mine = {"WANDB_RUN_ID": "x", "WANDB_RESUME": "must", "WANDB_SWEEP_ID": "y", "WANDB_NAME": "z"}
    for name, given, told in [
        ("a", {}, [f"WANDB_RUN_GROUP={tmp_path.name}"]),
        ("b", mine, ["WANDB_NAME=z/b", f"WANDB_RUN_GROUP={tmp_path.name}"]),
        ("c", {"WANDB_RUN_GROUP": "g"}, ["WANDB_RUN_GROUP=g"]),
    ]:
        with monkeypatch.context() as patch:
            for variable, value in given.items():
                patch.setenv(variable, value)
            arm = Arm(name, RunFolder(Path(name)), [], {})
            arm.start(str(script))
            arm.process.wait()
        assert (tmp_path / name / "output.txt").read_text().splitlines() == told


OWN_PRIMARY = """
defaults: [train, _self_]
hydra: {{searchpath: ["file://{configs}"]}}
seed: 7
"""


@pytest.mark.parametrize(
    "how",
    [
        ["hydra.searchpath=[file://{folder}/options]", "--config-dir={folder}", "-cn", "own"],
        pytest.param(
            ["--config-path", "{folder}", "--config-n", "own.yaml", "hydra.mode=MULTIRUN"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_users_own_configurations_reach_every_arm(here, tmp_path, monkeypatch, how):
    """The words of an arm, as its command is given them, compose in a process of its own too: to
    what the sweep has checked, or the arm refuses itself."""
    folder = tmp_path / "conf"
    options = folder / "options" if "--config-path" not in how else folder
    (options / "schedule").mkdir(parents=True)
    (options / "schedule" / "mine.yaml").write_text(
        (config_dir() / "schedule" / "linear.yaml").read_text()
    )
    (folder / "own.yaml").write_text(OWN_PRIMARY.format(configs=config_dir()))
    script = tmp_path / "write_words"
    write = f"import json, os, sys; json.dump([os.environ['{CHECKED}'], sys.argv[1:]], sys.stdout)"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -c {shlex.quote(write)} "$@"\n')
    script.chmod(0o755)
    typed = [
        "logger=none",
        "schedule=cosine,mine",
        "hydra.sweep.dir=swept",
        f"hydra.launcher.prefix={script}",
        *(word.format(folder=folder) for word in how),
    ]
    multirun = [] if "hydra.mode=MULTIRUN" in how else ["-m"]
    result = here("sdtrain", *multirun, *typed, cwd=tmp_path)
    assert result.code == 1, result.err  # the prefix does not run what it is given
    told = {}
    for name in ("cosine", "mine"):
        output = tmp_path / "swept" / f"schedule={name}" / "output.txt"
        told[name] = json.loads(output.read_text())
    digest, command = told["mine"]
    assert told["cosine"][1] == [word.replace("=mine", "=cosine") for word in command]
    assert told["cosine"][0] != digest
    assert command[:2] == [sys.executable, str(SCRIPT)]
    flags, words = read_flags(command[2:])
    config = compose_config("train", words, flags)  # in another folder
    assert config["seed"] == 7
    monkeypatch.setenv(CHECKED, digest)
    check_arm_digest(make_plan(precheck_config(config, words)).config)
    assert CHECKED not in os.environ  # a first stage is another configuration


def test_an_arm_that_composes_another_configuration_refuses_itself(
    train_tiny, tmp_path, monkeypatch
):
    monkeypatch.setenv(CHECKED, "0" * 64)
    assert train_tiny(tmp_path / "run").code == 2
    assert not list((tmp_path / "run").iterdir())


def test_the_first_stage_finds_the_users_own_experiment(composed, tmp_path, monkeypatch):
    """And has what both stages share of the configuration, typed or not."""
    monkeypatch.delenv("WANDB_MODE", raising=False)
    config = composed("data=images", "data.path='it\\'s'", "logger=wandb", "logger.project=mine")
    config["trainer"]["threads"] = 3
    words = [f"--config-path={tmp_path}", "--config-name=own", "hydra.searchpath=[x]", "seed=1"]
    command = first_stage_words(config, words)
    assert command[:2] == [f"--config-dir={tmp_path}", "hydra.searchpath=[x]"]
    first_stage = composed(*(word for word in command[2:] if not word.startswith("hydra.")))
    for section, key in (("data", "path"), ("logger", "project"), ("trainer", "threads")):
        assert first_stage[section][key] == config[section][key]
    assert first_stage["logger"] == config["logger"]
    config["logger"] = None
    command = first_stage_words(config, [])
    assert not composed(*(word for word in command if not word.startswith("hydra.")))["logger"]
