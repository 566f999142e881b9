"""Count the network evaluations that one picture takes."""

import torch
from torch import Tensor

from sdtrain.diffusion import Denoise
from sdtrain.diffusion.guidance import CONDITIONED, NOTHING, UNCONDITIONED
from sdtrain.generation.drawing import Drawing
from sdtrain.schedules import Schedule


def count_evaluations(drawing: Drawing, schedule: Schedule, shape: tuple[int, ...]) -> int:
    """Return the number of network evaluations for one picture with latents of `shape` [C, h, w].

    They are counted by sampling once with a network that predicts zeros.
    """
    calls = []
    x = torch.zeros(1, *shape)

    def network(name: str) -> Denoise:
        def denoise(x: Tensor, t: Tensor) -> Tensor:
            calls.append(name)
            return torch.zeros_like(x)

        return denoise

    def noise(step: int) -> Tensor:
        return torch.zeros_like(x)

    denoisers = {name: network(name) for name in (CONDITIONED, UNCONDITIONED, NOTHING)}
    denoise = drawing.guidance(denoisers, drawing.guidance_scale, schedule)
    grid = drawing.grid(drawing.steps, schedule)
    drawing.sampler(denoise, x, grid, schedule, noise, None)
    return len(calls)
