"""Which arms share a training, and what is handed over."""

from types import SimpleNamespace

from sdtrain.runs.layout import RunFolder
from sdtrain.runs.manifest import newest_intact
from sdtrain.sweep.shared_training import copy_newest_checkpoint, find_shared_training


def arm(name, folder=None, minutes=None, **config):
    config = {"trainer": {"max_minutes": minutes}, "seed": 0, "sampler": "a", "steps": 1} | config
    return SimpleNamespace(name=name, config=config, run=RunFolder(folder))


def test_what_differs_in_sampling_alone_is_trained_once():
    arms = [arm("a"), arm("b", sampler="b"), arm("c", steps=2), arm("d", seed=1), arm("e", seed=1)]
    shared = {name: first.name for name, first in find_shared_training(arms).items()}
    assert shared == {"b": "a", "c": "a", "e": "d"}
    for key in ("data", "model", "schedule", "prediction", "optimizer"):
        assert not find_shared_training([arm("a", **{key: 1}), arm("b", **{key: 2})]), key
    # One that went on would train for the same time again.
    assert not find_shared_training([arm("a", minutes=1), arm("b", sampler="b", minutes=1)])


def test_the_last_weights_are_handed_over_once(tiny_run, tmp_path):
    second = arm("b", tmp_path / "b")
    copy_newest_checkpoint(arm("a", tiny_run), second)
    newest, _ = newest_intact(second.run.path)
    assert newest.name == "000000000064" and second.run.trained_by.read_text() == "a\n"
    second.run.trained_by.unlink()
    copy_newest_checkpoint(arm("a", tiny_run), second)
    assert not second.run.trained_by.exists()
