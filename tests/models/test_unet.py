"""The UNet: its shapes, and that it learns what is known in closed form."""

import math

import pytest
import torch

from sdtrain.diffusion import Objective
from sdtrain.diffusion.prediction import Epsilon
from sdtrain.diffusion.times import Uniform
from sdtrain.diffusion.weighting.simple import Simple
from sdtrain.errors import UserError
from sdtrain.models.unet import UNet
from sdtrain.schedules.scaled_linear import scaled_linear


def make(**changed):
    torch.manual_seed(0)
    small = {
        "latent_channels": 4,
        "context_dim": 16,
        "block_channels": [32],
        "layers_per_block": 1,
        "attention": [True],
        "head_dim": 16,
        "norm_groups": 8,
    }
    return UNet(**small | {"pooled_context": False} | changed)


@pytest.mark.parametrize("pooled", [False, True])
def test_shape_and_every_argument_reaches_the_output(pooled):
    unet = make(block_channels=[32, 64], attention=[False, True], pooled_context=pooled)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 8, 8, generator=generator)
    context = torch.randn(3, 5, 16, generator=generator)
    timestep = torch.tensor([0.0, 500.0, 999.0])
    with torch.no_grad():
        output = unet(x, timestep, context)
        assert output.shape == x.shape
        for other in (
            unet(x + 1, timestep, context),
            unet(x, timestep + 9, context),
            unet(x, timestep, context.roll(1, 0)),
        ):
            assert (other - output).abs().amax((1, 2, 3)).min() > 1e-5
        torch.testing.assert_close(
            unet(x[1:2], timestep[1:2], context[1:2]), output[1:2], rtol=0, atol=1e-5
        )  # each sample by itself


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        ({"attention": [True, True]}, "model.unet.attention"),
        ({"block_channels": [36]}, "model.unet.block_channels"),
        ({"norm_groups": 5}, "model.unet.block_channels"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_name(changed, key):
    with pytest.raises(UserError) as refused:
        make(**changed)
    assert refused.value.key == key
    assert next(iter(changed)) in str(refused.value)


@pytest.mark.slow
def test_a_tiny_unet_reaches_the_floor_of_unit_gaussian_latents():
    """x0 ~ N(0, 1): eps* = sigma x and E|eps - eps*|^2 = alpha^2 at every level, whose mean over
    the table is the floor of the training loss.
    """
    schedule = scaled_linear()
    unet = make()
    generator = torch.Generator().manual_seed(1)
    objective = Objective(
        schedule=schedule, prediction=Epsilon(), weighting=Simple(), times=Uniform()
    )
    steps = 400
    batch = 64
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3, weight_decay=0.0)
    context = torch.zeros(batch, 1, 16)

    def losses(network, count):
        x0, noise = torch.randn(2, count, 4, 4, 4, generator=generator)
        u = (
            torch.randperm(count, generator=generator)
            + torch.rand(count, generator=generator, dtype=torch.float64)
        ) / count
        return objective(network, x0, noise, u).per_sample

    for step in range(steps):
        optimizer.param_groups[0]["lr"] = (
            2e-3 * min(1, step / 40) * (1 + math.cos(math.pi * step / steps)) / 2
        )
        optimizer.zero_grad()
        losses(lambda x, timestep: unet(x, timestep, context), batch).mean().backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    floor = (1 - betas).cumprod(0).mean().item()
    with torch.no_grad():
        measured = torch.cat(
            [losses(lambda x, timestep: unet(x, timestep, context), batch) for _ in range(256)]
        ).double()
    print(f"floor {floor:.4f}, reached {measured.mean().item():.4f}")
    # 1,048,576 squared errors: their mean is known to 0.001.
    assert floor - 0.003 < measured.mean().item() < floor + 0.01
