"""Checking a configuration changes nothing, and an error says what is wrong."""

import copy

import pytest
from reading import with_values

from sdtrain.config.precheck import precheck_config
from sdtrain.errors import UserError
from sdtrain.training.plan import make_plan

VALUES = [  # refused without torch, which precheck_config does not need: see test_before_torch.py
    "seed=abc",
    "trainer.max_images=0",
    "trainer.precision=fp16",
    "trainer.devices=2",
    "trainer.accumulate=3",
    "checkpoint.keep=1",
    "data.batch_size=0",
    "resume=maybe",
    "resume_allow=[weightin]",
    "trainer._target_=torch.optim.AdamW",
    "optimizer.lr=-1",
]
COMPOSED = [
    "trainer.precision=16-mixed trainer.max_skipped=3",
    "prediction=none",
    "callbacks=autoencoder",
    "model=autoencoder",
]


@pytest.mark.parametrize("words", [*VALUES, *COMPOSED])
def test_the_precheck_refuses_what_needs_no_torch(composed, words):
    typed = words.split()
    config = with_values(composed(), words) if words in VALUES else None
    with pytest.raises(UserError):
        precheck_config(config or composed(*typed), typed)


def test_the_size_of_pictures_follows_the_model(composed):
    pictures = ["data=images", "data.path=x"]
    for words, size in (
        ([], 32),
        (["data.image_size=48"], 48),
        (["experiment=images_autoencoder"], 32),
        (["model=sd15"], 64 * 4),  # side of the latents, and downsampling of the first stage
    ):
        typed = [*words, *pictures]
        data = precheck_config(composed(*typed), typed).config["data"]
        assert data["image_size"] == size, words
        assert data["num_workers"] is None
    for wrong in ("-1", "many", "true"):
        words = [*pictures, f"data.num_workers={wrong}"]
        with pytest.raises(UserError) as refused:
            precheck_config(composed(*words), words)
        assert refused.value.key == "data.num_workers"


def test_a_precheck_and_a_plan_never_change(composed):
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


def test_what_makes_way_is_in_the_plan_alone(planned, refused):
    """An experiment's weighting that does not suit what was typed."""
    words = ["schedule=flow", "prediction=flow"]
    plan = planned(*words)
    assert plan.prechecked.config["weighting"]["_target_"].endswith("Debiased")
    assert plan.config["weighting"]["_target_"].endswith("Simple")
    assert len(plan.notes) == 1
    assert refused(*words, "weighting=debiased").exit_code == 2


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


@pytest.mark.parametrize("option", ["callbacks=none", "validation=none"])
def test_settings_of_an_experiment_give_way_to_an_option_that_switches_them_off(composed, option):
    words = ["experiment=emoji", option]
    config = precheck_config(composed(*words), words).config
    if option == "validation=none":
        assert config["validation"] is None
    else:
        assert not any(config["callbacks"].values())
    typed = ["callbacks.samples.every=3" if option == "callbacks=none" else "validation.every=3"]
    with pytest.raises(UserError) as caught:
        precheck_config(composed(*words, *typed), [*words, *typed])
    assert caught.value.key == typed[0].partition("=")[0]


def test_keys_about_depth_maps_need_a_condition_that_reads_them(tiny_config, tmp_path):
    """Of an autoencoder only those that say which pictures are depth maps have an effect."""
    usual = ["data=dataset", f"data.path={tmp_path}"]
    column = "data.columns.depth=depth"
    folder = f"data.depth={tmp_path}"
    autoencoder = ["experiment=dataset_autoencoder", f"data.path={tmp_path}"]
    for words in ([*usual, column], [*usual, folder], [*autoencoder, folder]):
        with pytest.raises(UserError) as caught:
            precheck_config(tiny_config(*words), words)
        assert caught.value.key == words[-1].partition("=")[0]
    for words in (
        [*usual, "model/channels=[depth]", column],
        [*usual, "data.columns.depth=null"],
        [*autoencoder, column],
    ):
        precheck_config(tiny_config(*words), words)
