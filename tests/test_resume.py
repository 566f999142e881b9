"""What may change when a run goes on, and what it takes to allow it."""

import json
import shutil

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
