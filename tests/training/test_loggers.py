"""What the loggers that write into the run's folder get, read back from what they wrote."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
from reading import lines, newest

from sdtrain.errors import UserError
from sdtrain.training.loggers import local


def csv_rows(run: Path) -> list[dict[str, str]]:
    with open(run / "csv" / "metrics.csv") as file:
        return list(csv.DictReader(file))


def events_of(run: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return events


SEEN = ["callbacks.samples.every=16", "validation.every=16"]


def test_csv_holds_the_numbers_of_a_run_and_of_the_run_that_goes_on(train_tiny, tmp_path):
    run = tmp_path / "run"
    words = ["logger=csv", "lr_schedule=constant", "callbacks=none", *SEEN[1:]]
    for more in (["trainer.max_images=16"], ["trainer.max_images=32", "resume=must"]):
        result = train_tiny(run, *words, *more)
        assert result.code == 0, result.err
    for key in ("train/loss", "validation/loss"):
        written = [(row["images_seen"], row[key]) for row in csv_rows(run) if row[key]]
        wanted = [(str(line["images_seen"]), str(line[key])) for line in lines(run) if key in line]
        assert written == wanted and len(written) == 2


@pytest.fixture(scope="module")
def tensorboard_run(train_tiny, tmp_path_factory):
    run = tmp_path_factory.mktemp("tensorboard") / "run"
    result = train_tiny(run, "logger=tensorboard", "trainer.max_images=32", *SEEN)
    assert result.code == 0, result.err
    return run


def test_tensorboard(tensorboard_run):
    events = events_of(tensorboard_run)
    for key in ("train/loss", "train/lr", "validation/loss"):
        wanted = {}
        for line in lines(tensorboard_run):
            if key in line:
                wanted[line["images_seen"]] = line[key]
        found = events.Scalars(key)
        assert [event.step for event in found] == list(wanted) == [16, 32]
        values = [event.value for event in found]
        np.testing.assert_allclose(values, list(wanted.values()), rtol=1e-6)
    assert [image.step for image in events.Images("samples/grid")] == [16, 32]


@pytest.mark.slow
def test_tensorboard_of_a_resumed_run_has_each_step_once(train_tiny, tensorboard_run, tmp_path):
    run = shutil.copytree(tensorboard_run, tmp_path / "run")
    shutil.rmtree(newest(run))  # as if it had been killed before it was written
    words = ["logger=tensorboard", "trainer.max_images=32", *SEEN, "resume=must"]
    result = train_tiny(run, *words)
    assert result.code == 0, result.err
    assert [event.step for event in events_of(run).Scalars("train/loss")] == [16, 32]


def test_tensorboard_is_refused_before_anything_is_loaded(planned, monkeypatch):
    monkeypatch.setattr(local, "find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        planned("logger=tensorboard")
    assert caught.value.key == "logger" and caught.value.exit_code == 2
    assert "sdtrain[tensorboard]" in caught.value.remedy
