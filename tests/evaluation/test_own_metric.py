"""A metric of the user's own: one file and one yaml outside of sdtrain, and no edit in it."""

import json

import numpy as np
import pytest
from PIL import Image

from sdtrain.config.run_readers import check_evaluate
from sdtrain.data.shapes import Shapes
from sdtrain.errors import UserError
from sdtrain.evaluation.evaluate import build_metrics

CODE = '''
from sdtrain.evaluation.metric import Measurement, Metric


class MeanColour(Metric):
    """Mean of each channel over the samples."""

    unit = "RGB value"

    def __init__(self, *, highest: float) -> None:
        self.highest = highest

    def measure(self, subject):
        means = (subject.samples.mean((0, 2, 3)) + 1) / 2 * self.highest
        return Measurement({"samples": dict(zip(["red", "green", "blue"], means.tolist()))})

    def format(self, value):
        return f"{value:.0f} of {self.highest:.0f}"
'''

YAML = """\
# @package metrics.mean_colour
_target_: a_strangers_package.MeanColour
highest: 255.0             # value of a channel that is wholly on
"""


@pytest.fixture
def searchpath(own_part) -> str:
    """The word that adds the stranger's yaml files; the package can be imported."""
    return own_part("metric/mean_colour", "a_strangers_package", CODE, YAML)


def mean_colour(run, out, here, *words: str):
    settings = ["num_images=3", "steps=2", "seed=5", "accelerator=cpu", f"output={out}"]
    return here("sdtrain-evaluate", f"checkpoint={run}", *settings, *words)


def test_a_metric_is_one_file_and_one_yaml(here, tiny_run, searchpath, tmp_path):
    out = tmp_path / "out"
    result = mean_colour(tiny_run, out, here, "metrics=mean_colour", searchpath)
    assert result.code == 0, result.err
    found = json.loads((out / "evaluation.json").read_text())
    means = found["mean_colour"]["samples"]
    assert list(means) == ["red", "green", "blue"]
    assert found["settings"].keys() == {"mean_colour"}
    assert [path.name for path in out.iterdir()] == ["evaluation.json"]
    for row, value in means.items():
        assert 0 < value < 255
        line = next(line for line in result.out.splitlines() if row in line)
        assert f"{value:.0f} of 255" in line
    assert "mean_colour" in result.out and "RGB value" in result.out
    assert "is better" not in result.out

    # Its arguments are keys, and it is measured beside ours, on the same pictures.
    both = "metrics=[mean_colour,prompt_accuracy]"
    words = [both, "metrics.mean_colour.highest=1", searchpath]
    result = mean_colour(tiny_run, out, here, *words)
    assert result.code == 0, result.err
    again = json.loads((out / "evaluation.json").read_text())
    assert again.keys() >= {"mean_colour", "prompt_accuracy"}
    for row, value in again["mean_colour"]["samples"].items():
        assert value == pytest.approx(means[row] / 255, rel=1e-4)
    assert "higher is better" in result.out


def test_it_measures_the_samples_of_the_requests(here, tiny_run, searchpath, tmp_path):
    """The pictures are those that sdtrain-sample draws for the same prompts and seeds."""
    words = ["metrics=mean_colour", "metrics.mean_colour.highest=1", searchpath]
    result = mean_colour(tiny_run, tmp_path / "out", here, *words, "guidance_scale=3")
    assert result.code == 0, result.err
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    prompts = [f"prompt={prompt}" for prompt in Shapes().example_prompts(3)]
    settings = ["seed=5", "num_images=3", "steps=2", "guidance_scale=3", "accelerator=cpu"]
    folder = tmp_path / "drawn"
    words = [f"checkpoint={tiny_run}", *prompts, *settings, f"output={folder}"]
    result = here("sdtrain-sample", *words)
    assert result.code == 0, result.err
    drawn = []
    for place in range(3):  # of each prompt the picture of another seed
        picture = folder / f"{4 * place:05d}-seed{5 + place}.png"
        drawn.append(np.asarray(Image.open(picture), dtype=np.float64) / 255)
    means = np.mean(drawn, axis=(0, 1, 2))
    # A picture holds 256 values a channel, and pictures of another batch size round otherwise.
    assert list(found["mean_colour"]["samples"].values()) == pytest.approx(means, abs=0.004)


NODE = {"_target_": "a_strangers_package.MeanColour", "highest": 255.0}


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        (
            {"metrics": {"mean_colour": {"_target_": NODE["_target_"], "higest": 255.0}}},
            "metrics.mean_colour.highest",
        ),
        ({"metrics": {"mean_colour": NODE | {"highest": "many"}}}, "metrics.mean_colour.highest"),
        (
            {"metrics": {"mean_colour": NODE | {"_target_": "a_strangers_package.MeanColor"}}},
            "metrics.mean_colour",
        ),
        (
            {"metrics": {"mean_colour": {"_target_": "a_strangers_package.Measurement"}}},
            "metrics.mean_colour",
        ),
        ({"metric": {"mean_colour": NODE}}, "metric"),
        ({"metrics": {"seed": NODE}}, "metrics.seed"),
    ],
    ids=["argument", "type", "target", "no metric", "no package", "name"],
)
def test_a_yaml_that_does_not_fit_is_refused(composed, tiny_run, searchpath, changed, key):
    """What its yaml puts into the configuration, in the place of what fits."""
    config = composed("checkpoint=x", config="evaluate") | {"checkpoint": str(tiny_run)}
    with pytest.raises(UserError) as refused:
        build_metrics(check_evaluate(config | changed, []).metrics)
    assert refused.value.exit_code == 2
    assert refused.value.key.startswith(key)


def test_a_yaml_that_does_not_fit_ends_the_command(here, tiny_run, searchpath, tmp_path):
    wrong = YAML.partition("\n")[2]  # it lies under another key
    (tmp_path / "configs" / "metric" / "mean_colour.yaml").write_text(wrong)
    result = mean_colour(tiny_run, tmp_path / "out", here, "metrics=mean_colour", searchpath)
    assert result.code == 2, result.err
    assert "@package" in result.paragraph
    assert not (tmp_path / "out").exists()
