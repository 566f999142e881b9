"""Trained and frozen parts of the model: what is trained is in the checkpoint, and nothing else."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from sdtrain.assemble.model import build_model
from sdtrain.conditioning.interface import Conditioning
from sdtrain.models.autoencoder import Pixels
from sdtrain.types import Batch

SMALL = [
    "model.unet.block_channels=[16,16]",
    "model.unet.norm_groups=8",
    "model.unet.head_dim=8",
    "model.conditioner.context_dim=16",
    "model.conditioner.layers=1",
]


@pytest.fixture
def model(composed, tmp_path):
    return build_model(composed(*SMALL), tmp_path)


def prefixes(names) -> set[str]:
    return {name.partition(".")[0] for name in names}


def test_the_autoencoder_is_neither_trained_nor_saved(model):
    assert prefixes(model.trained_parameters()) == {"unet", "conditioner"}
    assert prefixes(model.trained_state()) == {"unet", "conditioner"}
    assert prefixes(model.state_dict()) == {"unet", "conditioner", "autoencoder"}
    assert list(model.frozen_hashes()) == ["autoencoder"]
    model.train()
    assert model.unet.training and not model.autoencoder.training
    assert not any(module.training for module in model.autoencoder.modules())


def test_a_frozen_conditioner_stays_as_it_is(model, composed, tmp_path):
    model.conditioner.frozen = True
    parts = {name: getattr(model, name) for name in model.PARTS}
    frozen = type(model)(**parts, objective=model.objective, caption_dropout=0.0)
    assert prefixes(frozen.trained_parameters()) == {"unet"}
    assert prefixes(frozen.trained_state()) == {"unet"}
    frozen.train()
    assert not frozen.conditioner.training
    assert not any(p.requires_grad for p in frozen.conditioner.parameters())


def test_the_trained_state_is_all_that_is_loaded(model, composed, tmp_path):
    """Weights of another seed; the frozen part keeps its own."""
    other = build_model(composed(*SMALL) | {"seed": 1}, tmp_path)
    own = {name: value.clone() for name, value in other.autoencoder.state_dict().items()}
    other.load_trained_state(model.trained_state())
    for name, value in model.trained_state().items():
        assert torch.equal(other.trained_state()[name], value)
    for name, value in other.autoencoder.state_dict().items():
        assert torch.equal(value, own[name])
    incomplete = dict(list(model.trained_state().items())[1:])
    with pytest.raises(RuntimeError):
        other.load_trained_state(incomplete)


class OwnAutoencoder(nn.Module):
    """As a user writes one who has not heard of frozen parts."""

    latent_scale = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.inward = nn.Conv2d(3, 4, 4, stride=4)

    def encode(self, image, noise=None):
        return self.inward(image)


def test_an_autoencoder_of_ones_own_is_frozen_unless_it_says_otherwise(model):
    parts = {"unet": model.unet, "conditioner": model.conditioner}
    rest = {"objective": model.objective, "caption_dropout": 0.0}
    own = type(model)(**parts, autoencoder=OwnAutoencoder(), **rest)
    assert "autoencoder" not in prefixes(own.trained_parameters())
    assert "autoencoder" not in prefixes(own.trained_state())


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_conditions_are_dropped_at_the_share_that_is_asked_for(model, share):
    """Within 4 standard errors, by the uniforms that travel with the batch."""
    count = 4096
    model.caption_dropout = share
    dropped = []

    def conditioner(inputs):
        dropped.append(inputs.dropped)
        return Conditioning(torch.zeros(count, 1, 16))

    model.unet = Echo()
    model.conditioner = Spy(conditioner)
    u = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noise = torch.zeros(count, 3, 2, 2)
    model.autoencoder = Pixels()
    batch = Batch(
        image=noise,
        caption=[""] * count,
        label=torch.zeros(count, dtype=torch.int64),
        depth=None,
        noise=noise,
        input_noise=None,
        posterior=None,
        u=u,
        drop=u,
        ordinal=torch.arange(count),
        stream_end=count,
    )
    with torch.no_grad():
        model.losses(batch)
    rate = dropped[0].double().mean().item()
    assert abs(rate - share) <= 4 * (share * (1 - share) / count) ** 0.5
    assert torch.equal(dropped[0], u < share)


def test_each_loss_is_multiplied_by_its_weight(model):
    count = 3
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, 4, 8, 8, generator=generator)
    batch = Batch(
        image=torch.rand(count, 3, 32, 32, generator=generator) * 2 - 1,
        caption=["a red star"] * count,
        label=torch.zeros(count, dtype=torch.int64),
        depth=None,
        noise=noise,
        input_noise=None,
        posterior=None,
        u=torch.full((count,), 0.5, dtype=torch.float64),
        drop=torch.ones(count, dtype=torch.float64),
        ordinal=torch.arange(count),
        stream_end=count,
    )
    weights = torch.tensor([1.0, 0.5, 3.0])
    with torch.no_grad():
        plain = model.losses(batch)
        weighted = model.losses(replace(batch, loss_weight=weights))
    assert torch.equal(weighted.per_sample, plain.per_sample * weights)
    assert torch.equal(weighted.t, plain.t)


class Echo(nn.Module):
    def forward(self, x, timestep, context):
        return x


class Spy(nn.Module):
    """A conditioner that calls a function."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, inputs):
        return self.function(inputs)
