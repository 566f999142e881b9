"""What the loggers that write into the run's folder get, read back from what they wrote."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
from reading import lines, newest

from sdtrain.config.precheck import precheck_config
from sdtrain.errors import UserError
from sdtrain.training.loggers import local
from sdtrain.training.plan import make_plan


def csv_rows(run: Path) -> list[dict[str, str]]:
    with open(run / "csv" / "metrics.csv") as file:
        return list(csv.DictReader(file))


def events_of(run: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return events


def test_csv(here, tiny, tmp_path):
    run = tmp_path / "run"
    words = tiny("logger=csv", "trainer.max_images=32")
    assert here("sdtrain", *words, f"hydra.run.dir={run}").code == 0
    for key in ("train/loss", "validation/loss"):
        written = [(row["images_seen"], row[key]) for row in csv_rows(run) if row[key]]
        wanted = [(str(line["images_seen"]), str(line[key])) for line in lines(run) if key in line]
        assert written == wanted


def test_csv_of_a_resumed_run_keeps_what_was_there(here, tiny, tmp_path):
    run = tmp_path / "run"
    words = ["logger=csv", "lr_schedule=constant"]
    first = tiny(*words, "trainer.max_images=32")
    assert here("sdtrain", *first, f"hydra.run.dir={run}").code == 0
    second = tiny(*words, "trainer.max_images=64", "resume=must")
    assert here("sdtrain", *second, f"hydra.run.dir={run}").code == 0
    assert sorted({int(row["images_seen"]) for row in csv_rows(run)}) == [16, 32, 48, 64]


def test_tensorboard(command, tiny, tmp_path):
    run = tmp_path / "run"
    result = command("sdtrain", *tiny("logger=tensorboard"), f"hydra.run.dir={run}")
    assert result.code == 0, result.err
    events = events_of(run)
    for key in ("train/loss", "train/lr", "validation/loss"):
        wanted = {line["images_seen"]: line[key] for line in lines(run) if key in line}
        found = events.Scalars(key)
        assert [event.step for event in found] == list(wanted)
        values = [event.value for event in found]
        np.testing.assert_allclose(values, list(wanted.values()), rtol=1e-6)
    assert [image.step for image in events.Images("samples/grid")] == [32, 64]


@pytest.mark.slow
def test_tensorboard_of_a_resumed_run_has_each_step_once(here, tiny, tmp_path):
    run = tmp_path / "run"
    words = tiny("logger=tensorboard", "callbacks.samples.every=0")
    assert here("sdtrain", *words, f"hydra.run.dir={run}").code == 0
    shutil.rmtree(newest(run))  # as if it had been killed before it was written
    assert here("sdtrain", *words, "resume=must", f"hydra.run.dir={run}").code == 0
    steps = [event.step for event in events_of(run).Scalars("train/loss")]
    assert steps == [16, 32, 48, 64]


def test_tensorboard_is_refused_before_anything_is_loaded(composed, monkeypatch):
    monkeypatch.setattr(local, "find_spec", lambda name: None)
    words = ["logger=tensorboard"]
    with pytest.raises(UserError) as caught:
        make_plan(precheck_config(composed(*words), words))
    assert caught.value.key == "logger" and caught.value.exit_code == 2
    assert "sdtrain[tensorboard]" in caught.value.remedy
