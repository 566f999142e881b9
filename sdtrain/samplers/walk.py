"""What every sampler is: a function that walks from noise to data over a grid of times, and the words for its arguments.

    sampler(denoise, x, grid, schedule, noise, show) -> x0

denoise(x, t) -> x0; x [B, C, h, w] standard normal at grid[0]; grid [n] falling float64 times; noise(step) a standard normal
tensor like x, keyed by each picture's seed; show(step, x, x0) is called at every step. n denoisings; the walk ends in x0.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from sdtrain.schedules import Schedule

Noise = Callable[[int], Tensor]
Show = Callable[[int, Tensor, Tensor], None]


def coefficients(schedule: Schedule, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha, sigma) at time t, with x's dtype and on its device. The grid itself stays on the CPU: indexing a table by it would wait for a GPU."""
    alpha, sigma = schedule.alpha_sigma(t, torch.promote_types(x.dtype, torch.float32))
    return alpha.to(x.device), sigma.to(x.device)


class Sampler(Protocol):
    def __call__(self, denoise, x: Tensor, grid: Tensor, schedule: Schedule, noise: Noise, show: Show | None = None) -> Tensor: ...
