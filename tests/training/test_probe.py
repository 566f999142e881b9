"""What trainer.probe=true says of a run, and that it leaves nothing behind."""

import re

import pytest
import torch
from diffusers.models.autoencoders.vae import Decoder

from sdtrain.models.unet import UNet
from sdtrain.training import estimate, probe

FIRST_STAGE = "first_stage={experiment:shapes_autoencoder,max_images:600}"


def row(out: str, name: str) -> str:
    """The value beside a name in the table that is printed."""
    (value,) = re.findall(rf"^  {name} +(.*)$", out, re.MULTILINE)
    return value


def test_the_times_are_those_of_the_networks(composed, tiny, train_config, monkeypatch, tmp_path):
    """By a clock that only the networks move: 2 s a step of 8 pictures, after two that are not
    counted and take longer.
    """
    now = [0.0]
    steps = []

    def move(module, given, output):
        if isinstance(module, UNet) and module.training:
            steps.append(len(given[0]))
            now[0] += 100 if len(steps) <= probe.WARM_UP else 0.25 * len(given[0])
        elif isinstance(module, Decoder):
            now[0] += 0.5 * len(given[0])

    for place in (probe, estimate):
        monkeypatch.setattr(place, "monotonic", lambda: now[0])
    words = [FIRST_STAGE, "trainer.max_images=1000", "looks.share=0.1", "trainer.probe=true"]
    typed = tiny(*words, "data.num_workers=0")
    hook = torch.nn.modules.module.register_module_forward_hook(move)
    try:
        result = train_config(tmp_path / "run", composed(*typed), typed)
    finally:
        hook.remove()
    assert result.code == 0, result.err
    assert len(steps) == probe.WARM_UP + probe.FEWEST and set(steps) == {8}
    assert row(result.out, "speed").startswith("4 images/s, 2 s a step of 8")
    assert "600 images, about 5 min" in row(result.out, "first stage")
    assert "1,000 images, about 4 min" in row(result.out, "training")
    assert row(result.out, "looks").startswith("about 25 s")
    assert row(result.out, "together").startswith("about 10 min")  # 300 + 250 + 25 s
    assert re.match(r"[1-9]\d* MiB", row(result.out, "memory"))
    assert not list((tmp_path / "run").iterdir())


def test_neither_a_resumed_run_nor_a_sweep_is_probed(refused, here, tmp_path, monkeypatch):
    assert refused("trainer.probe=true", "resume=must").key == "resume"
    result = here("sdtrain", "-m", "seed=0,1", "trainer.probe=true", cwd=tmp_path)
    assert result.code == 2 and "trainer.probe" in result.paragraph


@pytest.mark.slow
def test_two_ranks_are_probed_together_and_leave_no_folder(command, tiny, tmp_path):
    words = tiny("trainer.probe=true", "strategy=ddp", "trainer.devices=2")
    result = command("sdtrain", *words, cwd=tmp_path)
    assert result.code == 0, result.err
    assert "images/s" in row(result.out, "speed") and not result.err
    assert not list(tmp_path.iterdir())
