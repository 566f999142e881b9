"""What a network of one's own may bring along: draws of its own, parts in eval mode, and tied
weights.
"""

import math
import os
import random

import numpy as np
import pytest
import torch
from reading import flattened, newest, same

from sdtrain.assemble.load import load
from sdtrain.runs.layout import CheckpointFolder
from sdtrain.training.checkpoint_io import FolderIO

NETWORKS = '''
import random

import numpy as np
import torch
from torch import nn


class Plain(nn.Module):
    def __init__(self, *, latent_channels: int, context_dim: int) -> None:
        super().__init__()
        self.words = nn.Linear(context_dim, 8)
        self.first = nn.Conv2d(latent_channels, 8, 1)
        self.middle = nn.Conv2d(8, 8, 1)
        self.last = nn.Conv2d(8, latent_channels, 1)

    def more(self, hidden):
        return hidden

    def forward(self, x, timestep, context):
        words = self.words(context.mean(1))[:, :, None, None]
        hidden = self.first(x) + words + timestep.view(-1, 1, 1, 1) / 1000
        return self.last(self.more(self.middle(hidden).tanh()))


class Drawing(Plain):
    """Dropout, and a scale by chance: by Python's generator and by numpy's."""

    def more(self, hidden):
        if not self.training:
            return hidden
        return nn.functional.dropout(hidden, 0.3) * (random.random() + np.random.rand())


class Settled(Plain):
    """One part is in eval mode, another is put there by `train`; the third one learns."""

    def __init__(self, *, latent_channels: int, context_dim: int) -> None:
        super().__init__(latent_channels=latent_channels, context_dim=context_dim)
        self.kept = nn.Sequential(nn.BatchNorm2d(8), nn.Dropout(0.5)).eval()
        self.kept.append(nn.BatchNorm2d(8))
        self.pinned = nn.BatchNorm2d(8)

    def train(self, mode: bool = True):
        super().train(mode)
        self.pinned.eval()
        return self

    def more(self, hidden):
        return self.pinned(self.kept(hidden))


class Tied(Plain):
    """Two layers with one weight, and a table that both of two layers look up."""

    def __init__(self, *, latent_channels: int, context_dim: int) -> None:
        super().__init__(latent_channels=latent_channels, context_dim=context_dim)
        self.again = nn.Conv2d(8, 8, 1)
        self.again.weight = self.middle.weight
        for layer in (self.middle, self.again):
            layer.register_buffer("table", torch.arange(16.0))
        self.again.table = self.middle.table
        self.first.register_buffer("beginning", self.middle.table[:8])

    def more(self, hidden):
        return self.again(hidden.tanh())
'''


@pytest.fixture
def network(tmp_path, monkeypatch):
    """network(NAME) -> the word that chooses it."""
    packages = tmp_path / "packages"
    packages.mkdir()
    (packages / "own_networks.py").write_text(NETWORKS)
    monkeypatch.syspath_prepend(packages)
    return lambda name: f"model.unet._target_=own_networks.{name}"


@pytest.fixture
def trained(train_tiny, network, saved, tmp_path):
    """trained(NAME, NETWORK, "seed=1", ...) -> every tensor of its last checkpoint."""

    def run(name: str, network_name: str, *more: str) -> dict[str, torch.Tensor]:
        result = train_tiny(tmp_path / name, network(network_name), *more)
        assert result.code == 0, result.err
        return saved(tmp_path / name)

    return run


QUIET = [
    "trainer.max_images=16",
    "trainer.log_every=8",
    "callbacks.samples.every=0",
    "validation.every=0",
    "lr_schedule=constant",
    "data.size=32",
]


def unsettle() -> None:
    """As anything else in the process may do."""
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)


def test_draws_of_a_network_are_those_of_its_step(trained):
    """Whatever looks at the model in between, and in how many processes it is trained."""
    whole = trained("whole", "Drawing", *QUIET)
    looks = ["callbacks.samples.every=8", "validation.every=8"]
    unsettle()
    trained("parts", "Drawing", *QUIET, *looks, "trainer.max_images=8")
    unsettle()
    parts = trained("parts", "Drawing", *QUIET, *looks, "resume=must")
    assert same(parts, whole)


@pytest.mark.slow
def test_draws_of_a_network_differ_by_rank(trained, command, network, tiny, saved, tmp_path):
    """Two ranks train as one does in two micro-batches, which begin with other pictures."""
    parts = trained("parts", "Drawing", *QUIET, "trainer.accumulate=2")
    still = trained("still", "Drawing", *QUIET, "optimizer.lr=0", "trainer.max_images=8")
    ranks = ["strategy=ddp", "trainer.devices=2", f"hydra.run.dir={tmp_path}/ranks"]
    path = os.pathsep.join([str(tmp_path / "packages"), os.environ.get("PYTHONPATH", "")])
    words = tiny(network("Drawing"), *QUIET, *ranks)
    result = command("sdtrain", *words, env={"PYTHONPATH": path.rstrip(os.pathsep)})
    assert result.code == 0, result.err
    start = flattened(still)
    end = flattened(parts)
    apart = flattened(saved(tmp_path / "ranks")) - end
    assert apart.norm() < 1e-4 * (end - start).norm()


def test_looks_leave_each_part_in_its_own_mode(trained):
    """In two steps the statistics move twice where a part is in train mode, and never
    elsewhere.
    """
    looks = ["callbacks.samples.every=8", "validation.every=8", "callbacks.noise_levels.every=8"]
    found = trained("run", "Settled", *QUIET, *looks, "callbacks.noise_levels.num_images=2")
    moved = {}
    for name, value in found.items():
        if name.endswith("num_batches_tracked"):
            moved[name.removeprefix("model/unet.").rpartition(".")[0]] = int(value)
    assert moved == {"kept.0": 0, "kept.2": 2, "pinned": 0}


@pytest.mark.parametrize("memory", [pytest.param(math.inf, marks=pytest.mark.slow), 0.0])
def test_tied_weights_are_averaged_saved_and_drawn_with(trained, monkeypatch, tmp_path, memory):
    settings = dict(FolderIO.__init__.__kwdefaults__, memory=lambda: memory)
    monkeypatch.setattr(FolderIO.__init__, "__kwdefaults__", settings)
    fast = [*QUIET, "optimizer.lr=0.05"]
    trained("run", "Tied", *fast, "trainer.max_images=8")
    found = trained("run", "Tied", *fast, "resume=must")
    tied = [f"unet.{layer}.weight" for layer in ("middle", "again")]
    raw, same_raw = (found[f"model/{name}"] for name in tied)
    average = found[f"ema/{tied[0]}"]
    assert torch.equal(raw, same_raw) and not torch.equal(raw, average)
    for name, size in (("middle.table", 16), ("again.table", 16), ("first.beginning", 8)):
        assert torch.equal(found[f"model/unet.{name}"], torch.arange(float(size)))

    checkpoint = CheckpointFolder(newest(tmp_path / "run"))
    for ema, expected in ((True, average), (False, raw)):
        given = {"ema": ema, "device": "cpu", "allow": ["own_networks"], "autoencoder": None}
        unet = load(checkpoint, **given).model.unet
        assert unet.again.weight is unet.middle.weight
        assert torch.equal(unet.middle.weight, expected)
