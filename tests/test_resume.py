"""What may change when a run goes on, what it takes to allow it, and that a run killed anywhere ends in the same weights."""

import hashlib
import json
import shutil
import signal
import subprocess
import sys

import pytest

from sdtrain.checkpoints import published
from sdtrain.cli.resume import changes
from sdtrain.cli.session import newest_unfinished


@pytest.fixture
def middle(tiny_run, tmp_path):
    """A run folder that holds the middle checkpoint of `tiny_run` alone."""
    first = published(tiny_run)[0]
    shutil.copytree(first, tmp_path / "run" / "checkpoints" / first.name)
    return tmp_path / "run"


@pytest.mark.parametrize(("word", "allowed"), [
    ("weighting=min_snr", "weighting"), ("schedule=linear", "schedule"), ("data.batch_size=16", "data.batch_size"), ("data.seed=4", "data"),
    ("loss=huber", "loss"), ("model.caption_dropout=0.2", "model.caption_dropout"),
])
def test_what_would_be_another_run_goes_on_where_it_is_allowed(here, tiny, middle, word, allowed):
    words = [*tiny(word, "resume=must"), f"hydra.run.dir={middle}"]
    refused = here("sdtrain", *words)
    assert refused.code == 2 and f"resume_allow=[{allowed.partition('.')[0]}]" in refused.paragraph
    result = here("sdtrain", *words, f"resume_allow=[{allowed}]")
    assert result.code == 0 and f"changed since the checkpoint: {allowed.partition('.')[0]}" in result.out, result.err
    assert "resume" not in (middle / "config.yaml").read_text()


@pytest.mark.parametrize(("words", "said"), [
    (["model.unet.block_channels=[16,32]", "resume_allow=[model]"], "do not fit"), (["data.batch_size=32", "resume_allow=[data]"], "does not divide"),
    (["resume_allow=[weightin]"], "Did you mean 'weighting'"), (["schedule=linear", "resume_allow=[weighting]"], "resume_allow=[weighting,schedule]"),
])
def test_what_cannot_go_on_is_said_in_a_paragraph(here, tiny, middle, words, said):
    result = here("sdtrain", *tiny(*words, "resume=must"), f"hydra.run.dir={middle}")
    assert result.code == 2 and said in result.paragraph


def test_another_autoencoder_is_refused_unless_allowed():
    old, new = ({"model": {"autoencoder": {"path": None, "sha256": digest}}} for digest in ("a", "b"))
    assert list(changes(old, new)[1]) == ["model.autoencoder.sha256"]
    assert changes(old, new, ["model.autoencoder"]) == ({"model.autoencoder.sha256": ("a", "b")}, {})
    assert changes(old, new, ["model.auto"])[1]  # part of a word is no group


def test_an_unfinished_run_is_found_again_with_what_is_allowed(tiny, tiny_run, tmp_path, monkeypatch):
    run = tmp_path / "runs" / "shapes" / "earlier"
    shutil.copytree(tiny_run, run)
    (run / "status.json").write_text(json.dumps(json.loads((run / "status.json").read_text()) | {"state": "interrupted"}))
    monkeypatch.chdir(tmp_path)
    assert newest_unfinished(tiny("schedule=linear")) is None
    assert newest_unfinished(tiny("schedule=linear", "resume_allow=[schedule]")) == run


# A run that ends itself at the n-th call of a method, with no word to anyone, as kill -9 does.
KILLED = """
import os, signal, sys
from sdtrain.cli.train import main
from sdtrain.module import DiffusionModule
calls, last, step = 0, int(sys.argv.pop(1)), DiffusionModule.training_step

def counted(self, *given):
    global calls
    calls += 1
    if calls > last:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *given)

DiffusionModule.training_step = counted
main()
"""
WHOLE = ["trainer.max_images=160", "data.size=64", "checkpoint.every=16", "trainer.accumulate=4", "validation.every=32", "callbacks.samples.every=0"]


def digest(tensors: dict) -> str:
    """sha256 of all tensors: names, and bits."""
    found = hashlib.sha256()
    for key in sorted(tensors):
        found.update(key.encode() + tensors[key].detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


@pytest.fixture(scope="module")
def whole(here, tiny, saved, tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    assert here("sdtrain", *tiny(*WHOLE), f"hydra.run.dir={run}").code == 0
    return digest(saved(run))


def killed(words: list[str], run, micro_batches: int) -> None:
    """A process of its own, that ends by SIGKILL after so many micro-batches."""
    command = [sys.executable, "-c", KILLED, str(micro_batches), *words, f"hydra.run.dir={run}"]
    assert subprocess.run(command, capture_output=True, cwd=run.parent).returncode == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("at", [[20], [23], [32], [33], [18, 13]], ids=["mid-epoch", "mid-window", "end of an epoch", "after it", "twice"])
def test_killed_at_any_micro_batch_it_ends_in_the_same_weights(here, tiny, saved, whole, tmp_path, at):
    run = tmp_path / "run"
    for micro_batches in at:
        killed(tiny(*WHOLE, "resume=auto"), run, micro_batches)
    result = here("sdtrain", *tiny(*WHOLE, "resume=must"), f"hydra.run.dir={run}")
    assert result.code == 0, result.err
    assert digest(saved(run)) == whole


@pytest.mark.slow
def test_where_the_order_starts_again_it_ends_in_others(here, tiny, saved, whole, tmp_path, monkeypatch):
    """The twin: the stream of pictures begins at 0 after the resume."""
    from sdtrain.data.datamodule import DataModule

    killed(tiny(*WHOLE), tmp_path / "run", 20)
    monkeypatch.setattr(DataModule, "load_state_dict", lambda self, state: None)
    result = here("sdtrain", *tiny(*WHOLE, "resume=must"), f"hydra.run.dir={tmp_path / 'run'}")
    assert result.code == 0 and "Going on from" in result.out, result.err
    assert digest(saved(tmp_path / "run")) != whole
