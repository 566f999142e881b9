"""A condition of one's own is one file and one yaml: depth as a further input channel, with no edit
in sdtrain.
"""

import sys

import pytest
import torch
import yaml
from PIL import Image

from sdtrain.assemble.load import load
from sdtrain.assemble.model import check_part
from sdtrain.conditioning.interface import Conditioner, Inputs
from sdtrain.errors import UserError
from sdtrain.runs.checkpoint import read_weights
from sdtrain.runs.layout import CheckpointFolder
from sdtrain.runs.manifest import find_checkpoint, list_checkpoints

CONDITIONER = '''"""Depth beside x_t, and the caption's length as context."""

import torch
import torch.nn.functional as F
from torch import nn

from sdtrain.conditioning.interface import Conditioner, Conditioning, Inputs


class Depth(Conditioner):
    """One input channel: depth at the latents' size, -1 everywhere where it is dropped."""

    reads = frozenset({"depth"})
    channels = 1

    def __init__(self, *, context_dim: int) -> None:
        super().__init__()
        self.context_dim = context_dim
        self.token = nn.Parameter(torch.zeros(1, 1, context_dim))

    def forward(self, inputs: Inputs) -> Conditioning:
        depth = F.interpolate(inputs.depth, inputs.latent_size, mode="area") * 2 - 1
        dropped = inputs.dropped.view(-1, 1, 1, 1)
        channels = torch.where(dropped, -1.0, depth)
        return Conditioning(self.token.expand(len(depth), 1, -1), channels=channels)
'''
YAML = """\
_target_: depth_of_mine.Depth
context_dim: 16
"""


@pytest.fixture
def own(own_part):
    """The words that choose the conditioner."""
    found = own_part("model/conditioner/depth", "depth_of_mine", CONDITIONER, YAML)
    return [found, "model/conditioner=depth"]


def test_a_conditioner_of_ones_own_trains_and_draws(here, tiny, tmp_path, own):
    run = tmp_path / "run"
    words = [word for word in tiny() if not word.startswith("model.conditioner.")]
    words += [*own, "validation.every=0", "trainer.max_images=8", "callbacks.samples.every=8"]
    result = here("sdtrain", *words, f"hydra.run.dir={run}")
    assert result.code == 0, result.err
    weights = read_weights(list_checkpoints(run)[-1], "model")
    assert weights["unet.net.conv_in.weight"].shape[1] == 4 + 1
    assert "conditioner.token" in weights
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["model"]["conditioner"]["_target_"] == "depth_of_mine.Depth"
    assert (run / "samples" / "grid-000000008.png").exists()

    whole = CheckpointFolder(find_checkpoint(run))
    loaded = load(whole, ema=True, device="cpu", allow=["depth_of_mine"], autoencoder=None)
    model = loaded.model
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    outputs = []
    for depth in (torch.zeros(2, 1, 32, 32), torch.ones(2, 1, 32, 32)):
        kept = torch.zeros(2, dtype=torch.bool)
        inputs = Inputs(["", ""], kept.long(), kept, latent_size=(8, 8), depth=depth)
        with torch.no_grad():
            outputs.append(model.network(model.conditioner(inputs))(x, torch.zeros(2)))
    assert not torch.equal(*outputs)  # what it reads reaches the unet

    out = tmp_path / "out"
    words = [f"checkpoint={run}", "allow=[depth_of_mine]", "num_images=1", f"output={out}"]
    refused = here("sdtrain-sample", *words)
    assert refused.code == 2, refused.err
    assert "a depth map" in refused.paragraph
    assert not out.exists()

    sys.modules.pop("depth_of_mine")
    with pytest.raises(UserError) as refused:
        load(whole, ema=True, device="cpu", allow=[], autoencoder=None)
    assert "allow=[depth_of_mine]" in str(refused.value)
    assert "depth_of_mine" not in sys.modules


class Smelling(Conditioner):
    """Reads what no data have."""

    reads = frozenset({"caption", "smell"})


@pytest.mark.parametrize("wrong", [torch.nn.Linear(1, 1), Smelling()])
def test_what_is_no_conditioner_or_reads_what_there_is_not_is_refused(wrong):
    with pytest.raises(UserError) as refused:
        check_part(wrong, Conditioner, "model.conditioner")
    assert refused.value.key == "model.conditioner"


def test_a_conditioner_that_reads_nothing_is_one():
    check_part(Conditioner(), Conditioner, "model.conditioner")


def test_data_without_what_it_reads_are_refused(refused, tiny, tmp_path, own):
    (tmp_path / "pictures").mkdir()
    for number in range(12):
        picture = Image.new("RGB", (16, 16), (20 * number, 100, 50))
        picture.save(tmp_path / "pictures" / f"{number}.png")
        (tmp_path / "pictures" / f"{number}.txt").write_text("a colour")
    words = ["data=images", f"data.path={tmp_path}/pictures", "model/autoencoder=pixels"]
    words = tiny(*words, "data.image_size=16")
    words = [word for word in words if not word.startswith("model.conditioner.")]
    error = refused(*words, *own)
    assert error.exit_code == 2
    assert error.key == "model.conditioner"
    assert "depth" in str(error)
