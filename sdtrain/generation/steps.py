"""How far pictures of few steps are from those of many."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sdtrain.generation.drawing import Drawing, Request
from sdtrain.generation.generate import generate
from sdtrain.latent_diffusion import LatentDiffusion
from sdtrain.samplers.grids import trailing
from sdtrain.schedules.linear import linear


@dataclass(frozen=True)
class StepComparison:
    """pictures: {steps: [N, 3, H, W]}. distances: {steps: [N]}, from the pictures of the most
    steps, which are not among them: the root mean square over pixels, as a share of their range."""

    pictures: dict[int, Tensor]
    distances: dict[int, Tensor]

    @property
    def most(self) -> int:
        return max(self.pictures)


def compare_steps(
    model: LatentDiffusion,
    requests: list[Request],
    drawing: Drawing,
    image_size: int,
    steps: list[int],
    *,
    go_on: Callable[[], None] | None = None,
) -> StepComparison:
    """The same requests drawn with each number of steps. go_on: see `generate`.

    It means something for samplers that draw no noise (`draws_noise`): the others walk another path
    for each number.
    """
    pictures = {}
    for each in sorted(steps):
        one = replace(drawing, steps=each)
        pictures[each] = generate(model, requests, one, image_size, go_on=go_on)
    *few, most = pictures
    distances = {}
    for each in few:
        error = pictures[each] - pictures[most]
        distances[each] = error.square().mean((1, 2, 3)).sqrt() / 2
    return StepComparison(pictures, distances)


def draws_noise(drawing: Drawing) -> bool:
    """Whether the sampler asks for noise along the way."""
    asked = []
    schedule = linear()
    x = torch.zeros(1, 1, 2, 2)

    def noise(step: int) -> Tensor:
        asked.append(step)
        return x

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        return torch.zeros_like(x)

    drawing.sampler(denoise, x, trailing(4, schedule), schedule, noise, None)
    return bool(asked)
