"""What a configuration from a file may build: sdtrain's own parts, and not what they import."""

import pytest

from sdtrain.config.trusted import MOVED, check_targets, is_part_of_sdtrain, upgrade_config
from sdtrain.errors import UserError


@pytest.mark.parametrize(
    "target",
    [
        "sdtrain.models.unet.UNet",
        "sdtrain.schedules.cosine.cosine",
        "sdtrain.conditioning.text.Text",
        "sdtrain.latent_diffusion.LatentDiffusion",
    ],
)
def test_our_own_parts_are_ours(target):
    assert is_part_of_sdtrain(target)


@pytest.mark.parametrize(
    "target",
    [
        "sdtrain.models.unet.UNet2DConditionModel",  # a class that ours imports
        "sdtrain.data.emoji.Path",
        "sdtrain.data.emoji.subprocess.Popen",
        "sdtrain.data.emoji.os.system",
        "sdtrain.data.emoji.write_folder",  # a function of ours that makes no schedule
        "sdtrain.training.run.train",
        "sdtrain.nowhere.Thing",
        "os.system",
    ],
)
def test_what_ours_import_is_not_ours(target):
    assert not is_part_of_sdtrain(target)
    with pytest.raises(UserError):
        check_targets({"x": [{"_target_": target}]}, allow=["sdtrain"])


def test_moved_targets_are_renewed_wherever_they_stand():
    node = {"a": [{"_target_": old} for old in MOVED], "_target_": "other.Thing"}
    found = upgrade_config(node)
    assert [each["_target_"] for each in found["a"]] == list(MOVED.values())
    assert found["_target_"] == "other.Thing"
    assert node["a"][0]["_target_"] in MOVED  # a copy
