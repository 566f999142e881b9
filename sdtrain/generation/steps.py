"""Measure how far pictures sampled in few steps are from those sampled in many."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sdtrain.errors import UserError
from sdtrain.generation.drawing import Drawing, Request
from sdtrain.generation.generate import generate
from sdtrain.latent_diffusion import LatentDiffusion
from sdtrain.samplers.grids import trailing
from sdtrain.schedules.linear import linear


@dataclass(frozen=True)
class StepComparison:
    """The same pictures sampled with different numbers of steps.

    pictures: {steps: [N, 3, H, W]}. distances: {steps: [N]}, from the pictures with the most steps,
    which have no entry themselves: the root mean square over pixels, as a share of their range.
    """

    pictures: dict[int, Tensor]
    distances: dict[int, Tensor]

    @property
    def most(self) -> int:
        """The largest number of steps."""
        return max(self.pictures)


def compare_steps(
    model: LatentDiffusion,
    requests: list[Request],
    drawing: Drawing,
    image_size: int,
    steps: list[int],
    *,
    on_evaluation: Callable[[], None] | None = None,
) -> StepComparison:
    """Draw the same requests with each number of steps. on_evaluation: see `generate`.

    The comparison is meaningful only for samplers that draw no noise (see `draws_noise`): others
    take another random path for each number of steps.
    """
    pictures = {}
    for number in sorted(steps):
        shortened = replace(drawing, steps=number)
        pictures[number] = generate(
            model, requests, shortened, image_size, on_evaluation=on_evaluation
        )
    *few, most = pictures
    distances = {}
    for number in few:
        error = pictures[number] - pictures[most]
        distances[number] = error.square().mean((1, 2, 3)).sqrt() / 2
    return StepComparison(pictures, distances)


def draws_noise(drawing: Drawing) -> bool:
    """Return whether the sampler draws noise between its steps."""
    noisy_steps = []
    schedule = linear()
    x = torch.zeros(1, 1, 2, 2)

    def noise(step: int) -> Tensor:
        noisy_steps.append(step)
        return x

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        return torch.zeros_like(x)

    drawing.sampler(denoise, x, trailing(4, schedule), schedule, noise, None)
    return bool(noisy_steps)


def check_compared_steps(sampler_steps: list[int], drawing: Drawing, key: str) -> None:
    """Raise UserError, which names `key`, if the numbers of steps cannot be compared."""
    if not sampler_steps:
        return
    if min(sampler_steps) < 1 or len(set(sampler_steps)) < 2:
        raise UserError(
            "must be at least two different numbers, each at least 1, as [10,50,1000]; [] draws "
            "none",
            key=key,
            value=sampler_steps,
        )
    if draws_noise(drawing):
        raise UserError(
            f"{key} compares samples from the same noise, but sampler {drawing.sampler_name} draws "
            "new noise at each step",
            key=key,
            remedy="Choose sampler=ddim.",
        )
