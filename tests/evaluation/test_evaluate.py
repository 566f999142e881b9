"""sdtrain-evaluate on what a run or a sweep has left behind."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from sdtrain.assemble.training_data import TrainingData
from sdtrain.data.shapes import Shapes
from sdtrain.evaluation.evaluate import check_needs
from sdtrain.evaluation.metric import Metric
from sdtrain.evaluation.subject import Subject
from sdtrain.paths import config_dir
from sdtrain.runs.layout import CheckpointFolder
from sdtrain.runs.manifest import list_checkpoints, write_manifest

QUICK = ["num_images=2", "steps=2", "accelerator=cpu"]
ALL_METRICS = sorted(path.stem for path in (config_dir() / "metric").glob("*.yaml"))
METRICS = [name for name in ALL_METRICS if name not in ("class_accuracy", "depth_overlap")]
"""Those that measure a model of captions alone."""
SHORT = ["metrics.sampler_error.steps=[2,4]", "metrics.sampler_error.reference=8"]


def numbers(folder: Path) -> dict:
    return json.loads((folder / "evaluation.json").read_text())


@pytest.fixture(scope="module")
def measured(here, tiny_run, tmp_path_factory):
    """The newest checkpoint of a run, measured by every metric: (what was said, the folder)."""
    out = tmp_path_factory.mktemp("measured") / "out"
    words = [f"metrics=[{','.join(METRICS)}]", *QUICK, *SHORT, f"output={out}", "seed=3"]
    result = here("sdtrain-evaluate", f"checkpoint={tiny_run}", *words)
    assert result.code == 0, result.err
    return result.out, out


def test_every_metric_measures(tiny_run, measured):
    """The keys of evaluation.json, and a table that says unit and direction of each."""
    said, out = measured
    found = numbers(out)
    settings = {
        "checkpoint": str(list_checkpoints(tiny_run)[-1]),
        "config_sha256": hashlib.sha256((tiny_run / "config.yaml").read_bytes()).hexdigest(),
        "num_images": 2,
        "seed": 3,
        "steps": 2,
        "guidance_scale": 3.0,  # the run's own
        "sampler": {"name": "ddim", "eta": 0.0},
        "grid": {"name": "trailing"},  # of a table
        "guidance": {
            "name": "classifier_free",
            "rescale": 0.0,
            "log_snr_min": None,
            "log_snr_max": None,
            "max_std": 1.5,
        },
        "ema": True,
    }
    assert list(found) == [*settings, "settings", *METRICS]
    assert {key: found[key] for key in settings} == settings
    own = {key: value for key, value in settings.items() if key != "steps"}
    assert found["settings"] == dict.fromkeys(METRICS, settings) | {"sampler_error": own}
    for name in METRICS:
        assert name in said
        for column in found[name].values():
            assert column and all(0 <= value <= 1 for value in column.values())
    in_one_line = " ".join(said.split())
    assert in_one_line.count("higher is better") == 3
    assert in_one_line.count("lower is better") == 1
    of_two_pictures = found["sampler_error"]
    assert of_two_pictures["largest"]["2 steps"] > of_two_pictures["mean"]["2 steps"]
    assert "0.0 %" in said


def test_what_another_checkpoint_was_measured_to_be_goes(here, tiny_run, measured, tmp_path):
    older, _ = list_checkpoints(tiny_run)
    out = shutil.copytree(measured[1], tmp_path / "out")
    words = [f"checkpoint={older}", "metrics=prompt_accuracy", *QUICK, f"output={out}"]
    assert here("sdtrain-evaluate", *words).code == 0
    assert numbers(out)["settings"].keys() == {"prompt_accuracy"}
    assert "retrieval" not in numbers(out)


@pytest.fixture
def sweep(tiny_run, tmp_path) -> Path:
    """Arms: one that has no checkpoint, one whose averaged weights are missing, and one that is
    whole."""
    folder = tmp_path / "sweep"
    folder.mkdir()
    arms = ["never_begun", "raw", "whole"]
    (folder / "sweep.json").write_text(json.dumps({"words": [], "arms": arms}))
    for name in ("raw", "whole"):
        shutil.copytree(tiny_run, folder / name)
    for checkpoint in list_checkpoints(folder / "raw"):
        files = CheckpointFolder(checkpoint)
        files.ema.unlink()
        files.manifest.unlink()
        write_manifest(checkpoint)
    return folder


def test_each_arm_of_a_sweep_is_measured(here, sweep, tmp_path):
    """One that cannot be does not keep those after it from it, and decides the exit code."""
    result = here("sdtrain-evaluate", f"checkpoint={sweep}", *QUICK, f"output={tmp_path}/out")
    assert result.code == 2, result.err
    assert result.paragraph.startswith("raw ")
    assert "ema=false" in result.paragraph
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["whole"]
    found = numbers(tmp_path / "out" / "whole")
    assert found["checkpoint"] == str(list_checkpoints(sweep / "whole")[-1])
    assert "no checkpoint" in result.out
    assert "not evaluated: " in result.out


def test_an_arm_is_measured_into_its_own_run_unless_told_otherwise(here, sweep):
    shutil.rmtree(sweep / "whole")
    result = here("sdtrain-evaluate", f"checkpoint={sweep}", *QUICK, "ema=false")
    assert result.code == 0, result.err
    assert "prompt_accuracy" in numbers(sweep / "raw" / "evaluation")


def test_a_sweep_whose_record_is_broken_is_refused(here, tmp_path):
    sweep = tmp_path / "sweep"
    sweep.mkdir()
    (sweep / "sweep.json").write_text("{")
    result = here("sdtrain-evaluate", f"checkpoint={sweep}", *QUICK)
    assert result.code == 2
    assert f"checkpoint={sweep}" in result.paragraph


def test_data_that_are_gone_are_reported_before_anything_is_drawn(here, tiny_run, tmp_path):
    """By a metric that compares with them."""
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    (checkpoint,) = list_checkpoints(run)[-1:]
    files = CheckpointFolder(checkpoint)
    files.config.write_text(files.config.read_text().replace("size: 32", "size: 0", 1))
    files.manifest.unlink()
    write_manifest(checkpoint)
    words = ["metrics=[sampler_error,retrieval]", "steps=2", "num_images=2"]
    result = here("sdtrain-evaluate", f"checkpoint={run}", *words, f"output={tmp_path}/out")
    assert result.code in (2, 3) and "data.size" in result.paragraph, result.err
    assert not (tmp_path / "out").exists()


class Unmet(Metric):
    needs = frozenset({"a_piano"})


def test_a_need_that_nobody_knows_is_refused():
    from sdtrain.errors import UserError

    with pytest.raises(UserError) as refused:
        check_needs("unmet", Unmet(), subject=None)
    assert refused.value.key == "metrics.unmet" and "captions" in refused.value.allowed


class Reader:
    """Stands where a model's conditioner does."""

    def __init__(self, reads):
        self.conditioner = self
        self.reads = frozenset(reads)
        self.num_classes = None


@pytest.mark.parametrize("reads", [(), ("caption",), ("label",), ("caption", "label")])
def test_requests_hold_what_the_model_reads(reads):
    """The data are asked for only where the model reads something of them."""
    node = {"_target_": "sdtrain.data.shapes.Shapes"}
    source = TrainingData(node, {}, [], record=None)
    subject = Subject(Reader(reads), None, 32, num_images=6, seed=2**40, data_source=source)
    requests = subject.requests
    assert [request.seed for request in requests] == [2**40 + place for place in range(6)]
    prompts = [request.prompt for request in requests]
    labels = [request.label for request in requests]
    assert prompts == (Shapes().example_prompts(6) if "caption" in reads else [""] * 6)
    # Spread evenly over the 48 classes.
    assert labels == ([0, 8, 16, 24, 32, 40] if "label" in reads else [0] * 6)
    assert source.was_used == bool(reads)
