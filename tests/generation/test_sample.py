"""sdtrain-sample: what it asks the model for, and that it asks for nothing but the model."""

import json
from types import SimpleNamespace

import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file

from sdtrain.assemble.drawing import build_drawing
from sdtrain.conditioning.class_label import ClassLabel
from sdtrain.conditioning.interface import Conditioner
from sdtrain.config.run_readers import check_sample
from sdtrain.errors import UserError
from sdtrain.generation.drawing import Request, record_of
from sdtrain.generation.sample import _request_metadata, build_requests
from sdtrain.paths import config_dir
from sdtrain.schedules.laplace import laplace
from sdtrain.schedules.linear import linear


class Reading(Conditioner):
    """A conditioner of which only `reads` matters."""

    def __init__(self, *reads: str) -> None:
        super().__init__()
        self.reads = frozenset(reads)


def config(**changes) -> SimpleNamespace:
    plain = {"prompt": [], "label": [], "negative_prompt": "", "guidance_scale": 3.0}
    return SimpleNamespace(**(plain | {"seed": 5, "num_images": 2} | changes))


def asked(conditioner, **changes) -> list[tuple]:
    requests = build_requests(config(**changes), conditioner)
    return [(each.prompt, each.label, each.seed) for each in requests]


def test_each_prompt_and_label_has_the_same_seeds():
    found = asked(Reading("caption"), prompt=["a", "b"])
    assert found == [("a", 0, 5), ("a", 0, 6), ("b", 0, 5), ("b", 0, 6)]
    assert asked(Reading("caption"), prompt="a") == [("a", 0, 5), ("a", 0, 6)]
    labels = ClassLabel(num_classes=4, context_dim=2)
    assert asked(labels, label=[3, 0]) == [("", 3, 5), ("", 3, 6), ("", 0, 5), ("", 0, 6)]
    assert asked(labels, label=3, num_images=1) == [("", 3, 5)]
    assert asked(Reading()) == [("", 0, 5), ("", 0, 6)]


@pytest.mark.parametrize(
    ("reads", "key", "changes"),
    [
        (("caption",), "prompt", {}),
        ((), "prompt", {"prompt": "a"}),
        (("label",), "prompt", {"label": 0, "negative_prompt": "a"}),
        (("label",), "label", {}),
        (("caption",), "label", {"prompt": "a", "label": 0}),
        (
            ("caption",),
            "negative_prompt",
            {"prompt": "a", "negative_prompt": "b", "guidance_scale": 1.0},
        ),
    ],
)
def test_what_the_model_does_not_read_is_refused_and_so_is_what_is_missing(reads, key, changes):
    with pytest.raises(UserError) as refused:
        asked(Reading(*reads), **changes)
    assert refused.value.key == key


def test_classes_called_by_numbers_are_asked_for_by_them():
    labels = ClassLabel(num_classes=3, context_dim=2, class_names=["1", "2", "10"])
    assert [label for _, label, _ in asked(labels, label=[1, "2", 10], num_images=1)] == [0, 1, 2]
    with pytest.raises(UserError) as refused:
        asked(labels, label=0)
    assert refused.value.key == "label"


def test_a_picture_says_its_class():
    labels = ClassLabel(num_classes=2, context_dim=2, class_names=["cat", "dog"])
    described = [_request_metadata(Request(5, label=label), labels) for label in (0, 1)]
    assert described == [
        {"seed": 5, "label": 0, "class_name": "cat"},
        {"seed": 5, "label": 1, "class_name": "dog"},
    ]


@pytest.mark.parametrize("label", [-1, 4])
def test_a_label_lies_within_the_classes(label):
    with pytest.raises(UserError) as refused:
        asked(ClassLabel(num_classes=4, context_dim=2), label=[0, label])
    assert refused.value.key == "label" and refused.value.value == label


@pytest.mark.parametrize("label", [-1, 4])
def test_the_labels_of_ones_own_conditioner_are_checked_where_it_says_how_many(label):
    own = Reading("label")
    assert asked(own, label=4, num_images=1) == [("", 4, 5)]
    own.num_classes = 4
    with pytest.raises(UserError) as refused:
        asked(own, label=label)
    assert refused.value.key == "label" and refused.value.value == label


def test_a_prompt_that_is_cut_is_told_and_a_key_that_is_not_there_too(here, tiny_run, tmp_path):
    words = [f"checkpoint={tiny_run}", "num_images=1", "steps=2", f"output={tmp_path}/out"]
    long = " ".join(["a red star"] * 20)
    result = here("sdtrain-sample", *words, f"prompt={long}", "prompt=a red star")
    assert result.code == 0, result.err
    assert result.err.count(long) == 1
    result = here("sdtrain-sample", *words, "prompt=x", "num_image=3")
    assert result.code == 2
    assert "Did you mean 'num_images'" in result.paragraph


@pytest.mark.parametrize("size", [(24, 48), (48, 24), (16, 16)])
def test_pictures_have_the_size_that_is_asked_for(here, tiny_run, tmp_path, size):
    height, width = size
    typed = f"[{height},{width}]" if height != width else str(width)
    words = [f"checkpoint={tiny_run}", "prompt=a red star", "num_images=2", "steps=2"]
    words += [f"image_size={typed}", "save_latents=true", f"output={tmp_path}/out"]
    result = here("sdtrain-sample", *words)
    assert result.code == 0, result.err
    with Image.open(tmp_path / "out" / "00001-seed1.png") as picture:
        assert picture.size == (width, height)
        assert json.loads(picture.text["sdtrain"])["image_size"] == json.loads(typed)
    latents = load_file(tmp_path / "out" / "latents.safetensors")["latents"]
    assert latents.shape == (2, 4, height // 4, width // 4)


@pytest.mark.parametrize("size", ["30", "[32,30]"])
def test_a_size_that_the_autoencoder_cannot_halve_is_refused(here, tiny_run, tmp_path, size):
    words = [f"checkpoint={tiny_run}", "prompt=a red star", f"image_size={size}"]
    result = here("sdtrain-sample", *words, f"output={tmp_path}/out")
    assert result.code == 2
    assert result.paragraph.startswith(f"image_size={size.replace(',', ', ')} ")
    assert not (tmp_path / "out").exists()


def test_no_prompt_is_none_and_a_key_like_no_other_is_refused(composed, tiny_run):
    """That a model of captions wants a prompt is said by build_requests, see above."""
    known = composed("checkpoint=x", config="sample") | {"checkpoint": str(tiny_run)}
    assert check_sample(known | {"prompt": None}, ["prompt=null"]).prompt == []
    with pytest.raises(UserError) as refused:
        check_sample(known | {"prompt": "x", "image": 3}, ["prompt=x", "+image=3"])
    assert refused.value.key == "image"
    assert "Did you mean" not in str(refused.value)


@pytest.fixture
def settings(composed):
    """settings("steps=7", ...) -> the record of a drawing of sdtrain-sample. sampler: the node of
    another sampler in place of the composed one."""

    def of(*words, schedule=linear, sampler=None):
        cfg = composed("checkpoint=x", *words, config="sample")
        if sampler:
            cfg["sampler"] = sampler
        return build_drawing(cfg, schedule()).settings

    return of


def test_every_way_of_drawing_has_a_record_of_its_own(settings):
    """As it was chosen, with every argument, in plain values: euler and ddim are two."""
    for path in (config_dir() / "sampler").glob("*.yaml"):
        if path.stem != "none":
            node = yaml.safe_load(path.read_text())
            node = node.get("sampler", node)  # of an option that brings its grid along
            assert settings(sampler=node)["sampler"]["name"] == path.stem
    assert settings("sampler=euler")["grid"]["name"] == "karras"
    words = ["sampler.eta=0.5", "grid=karras", "grid.rho=3", "guidance.rescale=0.5", "steps=7"]
    typed = settings(*words, "guidance_scale=2")
    assert typed["sampler"] == {"name": "ddim", "eta": 0.5}
    assert typed["grid"]["rho"] == 3
    assert typed["guidance"]["rescale"] == 0.5
    assert typed["steps"] == 7
    assert typed["guidance_scale"] == 2
    assert json.loads(json.dumps(typed)) == typed
    # grid=default is recorded as what it is under the schedule.
    assert settings()["grid"] == {"name": "trailing"}
    assert settings(schedule=laplace)["grid"]["name"] == "uniform_log_snr"


def test_ones_own_part_is_recorded_by_its_whole_path():
    assert record_of({"_target_": "mine.samplers.ddim", "_partial_": True, "eta": 1}) == {
        "name": "mine.samplers.ddim",
        "eta": 1,
    }
