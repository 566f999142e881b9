"""data.bucket_step fits the model by itself, and what does not fit is refused before torch."""

import pytest
from stable_diffusion import save_pipeline

from sdtrain.config.precheck import precheck_config
from sdtrain.errors import UserError

IMAGES = ["data=images", "data.path=pictures", "data.buckets=true"]
SHAPES = "model.autoencoder.path=data/shapes_autoencoder"


@pytest.mark.parametrize(
    ("words", "step"),
    [
        # The first stage's autoencoder and that of the shapes halve twice, the UNet once.
        ([], 8),
        ([SHAPES, "data.image_size=256"], 32),
        ([SHAPES, "data.image_size=1024"], 64),
        ([SHAPES, "data.bucket_step=4"], 4),
        (["model/autoencoder=pixels"], 4),
        ([SHAPES, "data.image_size=128", "model.unet.block_channels=[32,32,32,32,32]"], 32),
    ],
)
def test_a_step_is_chosen_that_fits(composed, words, step):
    assert composed(*IMAGES, *words)["data"]["bucket_step"] == step


def test_without_buckets_there_is_no_step(composed):
    config = composed(*IMAGES, "data.buckets=false")
    assert config["data"]["bucket_step"] is None
    precheck_config(config, IMAGES)
    for name, value in (("bucket_step", 8), ("bucket_max_ratio", 3.0)):
        typed = [*IMAGES[:2], f"data.{name}={value}"]
        with pytest.raises(UserError) as refused:
            precheck_config(composed(*typed), typed)
        assert refused.value.key == f"data.{name}"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.bucket_step", 64),
        ("data.bucket_step", 0),
        ("data.bucket_step", 12),
        ("data.bucket_max_ratio", 0.5),
        ("data.bucket_max_ratio", "wide"),
    ],
)
def test_bad_values_are_refused_before_torch(composed, key, value):
    typed = [*IMAGES, SHAPES, f"{key}={value}"]
    with pytest.raises(UserError) as refused:
        precheck_config(composed(*typed), typed)
    assert refused.value.key == key


@pytest.mark.parametrize("step", [6, 2])
def test_a_step_that_the_autoencoder_does_not_divide_is_refused(composed, step):
    with pytest.raises(UserError) as refused:
        composed(*IMAGES, SHAPES, f"data.bucket_step={step}")
    assert (refused.value.key, refused.value.value) == ("data.bucket_step", step)


def test_a_square_that_the_autoencoder_does_not_divide_is_refused(composed):
    with pytest.raises(UserError) as refused:
        composed(*IMAGES, SHAPES, "data.image_size=30")
    assert refused.value.key == "data.image_size"


def test_a_pipeline_draws_multiples_of_eight(composed, tmp_path):
    pipeline = save_pipeline(tmp_path / "pipeline")
    words = [*IMAGES, "model=stable_diffusion", f"model.pretrained={pipeline}"]
    assert composed(*words, "data.image_size=64")["data"]["bucket_step"] == 16
    with pytest.raises(UserError) as refused:
        composed(*words, "data.image_size=64", "data.bucket_step=12")
    assert refused.value.key == "data.bucket_step"
