"""What can be refused without torch is refused before it is imported; checking changes nothing."""

import copy
import os
import subprocess
import sys

import pytest

from sdtrain.config.precheck import precheck_config
from sdtrain.errors import UserError
from sdtrain.training.plan import make_plan

AFTERWARDS = """
import sys
from sdtrain.commands import train

sys.argv = ["sdtrain", *sys.argv[1:]]
try:
    train.main()
except SystemExit as left:
    print(left.code, "torch" in sys.modules)
"""

REFUSED_WITHOUT_TORCH = [
    "modl=x",
    "schedule=cosin",
    "seed=abc",
    "+sed=3",
    "trainer.max_images=0",
    "trainer.precision=fp16",
    "trainer.precision=16-mixed trainer.max_skipped=3",
    "trainer.devices=2",
    "trainer.accumulate=3",
    "checkpoint.keep=1",
    "data.batch_size=0",
    "prediction=none",
    "callbacks=autoencoder",
    "model=autoencoder",
    "resume=maybe",
    "resume_allow=[weightin]",
    "hydra.run.dir=",
    "resume=auto trainer.max_images=0",
    "resume=auto tariner.max_images=1",
    "resume=must hydra.run.dir=nothing",
    "trainer._target_=torch.optim.AdamW",
]


@pytest.mark.parametrize("words", REFUSED_WITHOUT_TORCH)
def test_refused_before_torch_is_imported(tmp_path, words):
    command = [sys.executable, "-c", AFTERWARDS, *words.split()]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert ended.stdout.split() == ["2", "False"], ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_a_folder_of_another_run_is_refused_before_torch_is_imported(tiny_run, tmp_path):
    command = [sys.executable, "-c", AFTERWARDS, f"hydra.run.dir={tiny_run}"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert ended.stdout.split() == ["2", "False"], ended.stderr
    assert "already holds a run" in ended.stderr


def test_a_task_of_a_scheduler_is_told_too(tmp_path):
    """A single process prints its paragraph, whatever rank its launcher calls it."""
    command = [sys.executable, "-c", AFTERWARDS, "trainer.max_images=0"]
    given = {"capture_output": True, "text": True, "cwd": tmp_path, "check": True}
    ended = subprocess.run(command, env=os.environ | {"SLURM_PROCID": "1"}, **given)
    assert ended.stdout.split() == ["2", "False"]
    assert "trainer.max_images=0 must be at least 1." in ended.stderr


@pytest.mark.parametrize("word", ["optimizer.lr=abc", "steps=2000", "callbacks.ema.decay=2"])
def test_refused_by_the_plan_it_leaves_nothing(here, tiny, tmp_path, word):
    result = here("sdtrain", *tiny(word), f"hydra.run.dir={tmp_path}/run")
    assert result.code == 2
    assert not list(tmp_path.iterdir())


def test_a_draft_and_a_plan_never_change(composed):
    words = ["data=images", "data.path=x", "weighting=edm", "schedule=cosine"]
    cfg = composed(*words)
    before = copy.deepcopy(cfg)
    prechecked = precheck_config(cfg, words)
    plan = make_plan(prechecked)
    assert cfg == before
    prechecked.config["seed"] = 5
    plan.config["model"]["caption_dropout"] = 2.0
    assert prechecked.config["seed"] == 0
    assert plan.config["model"]["caption_dropout"] == 0.1
    with pytest.raises(AttributeError):
        plan.notes = ()


def test_what_makes_way_is_in_the_plan_alone(composed):
    """An experiment's weighting that does not suit what was typed."""
    words = ["schedule=flow", "prediction=flow"]
    prechecked = precheck_config(composed(*words), words)
    plan = make_plan(prechecked)
    assert prechecked.config["weighting"]["_target_"].endswith("Debiased")
    assert plan.config["weighting"]["_target_"].endswith("Simple")
    assert len(plan.notes) == 1
    words.append("weighting=debiased")
    with pytest.raises(UserError):
        make_plan(precheck_config(composed(*words), words))


def test_an_error_names_the_key_and_the_value(composed):
    with pytest.raises(UserError) as refused:
        precheck_config(composed("trainer.max_images=0"), ["trainer.max_images=0"])
    assert refused.value.key == "trainer.max_images"
    assert refused.value.value == 0
    assert str(refused.value) == "trainer.max_images=0 must be at least 1."


def test_a_yaml_of_an_earlier_version_finds_its_classes(composed):
    cfg = composed()
    cfg["model"]["_target_"] = "sdtrain.module.DiffusionModule"
    cfg["callbacks"]["samples"]["_target_"] = "sdtrain.callbacks.sample_grid.SampleGrid"
    cfg["trainer"]["_target_"] = "sdtrain.cli.trainer.TrainerSettings"
    assert (
        make_plan(precheck_config(cfg, [])).config
        == make_plan(precheck_config(composed(), [])).config
    )
