"""What is said of the length of a first stage and its run."""

from dataclasses import replace

import pytest
import torch
from diffusers.models.autoencoders.vae import Decoder, Encoder

from sdtrain.assemble.model import build_data
from sdtrain.models.unet import UNet
from sdtrain.training import estimate as estimating
from sdtrain.training.estimate import estimate, format_duration


@pytest.mark.parametrize(("seconds_per_picture", "is_cached"), [(0.01, True), (2.0, False)])
def test_the_time_of_a_picture_is_that_of_its_networks(
    planned, tiny_config, monkeypatch, seconds_per_picture, is_cached
):
    """By a clock that only the networks move. At 2 s a picture a whole batch is too long to try.

    A run with a cache does not encode its pictures in each step.
    """
    now = [0.0]
    tried = []

    def move(module, given, output):
        if isinstance(module, UNet):
            now[0] += seconds_per_picture * len(given[0])
            tried.append(len(given[0]))
        elif isinstance(module, Encoder):
            now[0] += 5 * seconds_per_picture * len(given[0])
        elif isinstance(module, Decoder):
            now[0] += 3 * seconds_per_picture * len(given[0])

    monkeypatch.setattr(estimating, "monotonic", lambda: now[0])
    first = tiny_config("experiment=shapes_autoencoder", "trainer.max_images=100")
    stage = planned(config=first)
    run = planned(config=tiny_config("trainer.max_images=1000", "model/channels=[depth]"))
    config = run.config
    config["data"]["cache"] = "auto" if is_cached else "off"
    run = replace(run, _config=config)  # the pictures of Shapes are never cached
    hook = torch.nn.modules.module.register_module_forward_hook(move)
    try:
        found = estimate(stage, run, build_data(run.config["data"]))
    finally:
        hook.remove()
    assert found.first_stage == pytest.approx(100 * (3 + 5) * seconds_per_picture)
    per_step = 1 if is_cached else 1 + 5
    assert found.run == pytest.approx(1000 * per_step * seconds_per_picture)
    assert max(tried) == (8 if seconds_per_picture < 1 else 2)


def test_times_are_rounded_to_what_is_known():
    said = {0.2: "about 1 s", 80: "about 80 s", 1260: "about 21 min", 23760: "about 6.6 hours"}
    for seconds, words in said.items():
        assert format_duration(seconds) == words
