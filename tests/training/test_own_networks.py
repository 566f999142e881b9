"""What a network of one's own may bring along: draws of its own, parts in eval mode, and tied
weights.
"""

import os
import random

import numpy as np
import pytest
import torch
from reading import flattened, same

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
    """Dropout, and layers left out by chance: by Python's generator and by numpy's."""

    def more(self, hidden):
        if not self.training:
            return hidden
        if random.random() < 0.3 or np.random.rand() < 0.3:
            hidden = hidden * 2
        return nn.functional.dropout(hidden, 0.3)
'''


@pytest.fixture
def words(tiny, tmp_path, monkeypatch):
    """words(NETWORK, "seed=1", ...): a short run of that network."""
    packages = tmp_path / "packages"
    packages.mkdir()
    (packages / "own_networks.py").write_text(NETWORKS)
    monkeypatch.syspath_prepend(packages)

    def of(network: str, *more: str) -> list[str]:
        kept = [word for word in tiny(*more) if not word.startswith("model.unet.")]
        return [*kept, f"model.unet._target_=own_networks.{network}"]

    return of


@pytest.fixture
def trained(here, words, saved, tmp_path):
    """trained(NAME, NETWORK, "seed=1", ...) -> every tensor of its last checkpoint."""

    def run(name: str, network: str, *more: str) -> dict[str, torch.Tensor]:
        result = here("sdtrain", *words(network, *more), f"hydra.run.dir={tmp_path / name}")
        assert result.code == 0, result.err
        return saved(tmp_path / name)

    return run


QUIET = [
    "trainer.max_images=32",
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
    trained("parts", "Drawing", *QUIET, *looks, "trainer.max_images=16")
    unsettle()
    parts = trained("parts", "Drawing", *QUIET, *looks, "resume=must")
    assert same(parts, whole)


@pytest.mark.slow
def test_draws_of_a_network_differ_by_rank(trained, command, words, saved, tmp_path):
    """Two ranks train as one does in two micro-batches, which begin with other pictures."""
    parts = trained("parts", "Drawing", *QUIET, "trainer.accumulate=2")
    still = trained("still", "Drawing", *QUIET, "optimizer.lr=0", "trainer.max_images=8")
    ranks = ["strategy=ddp", "trainer.devices=2", f"hydra.run.dir={tmp_path}/ranks"]
    path = os.pathsep.join([str(tmp_path / "packages"), os.environ.get("PYTHONPATH", "")])
    result = command(
        "sdtrain", *words("Drawing", *QUIET, *ranks), env={"PYTHONPATH": path.rstrip(os.pathsep)}
    )
    assert result.code == 0, result.err
    start = flattened(still)
    end = flattened(parts)
    apart = flattened(saved(tmp_path / "ranks")) - end
    assert apart.norm() < 1e-4 * (end - start).norm()
