"""The interface between a network and the samplers: denoise(x, t) -> x0."""

from collections.abc import Callable

import torch
from torch import Tensor

from sdtrain.diffusion.objective import Network
from sdtrain.diffusion.prediction import Prediction
from sdtrain.schedules import Schedule

Denoise = Callable[[Tensor, Tensor], Tensor]
"""(x [B, C, h, w], t scalar) -> the expected x0 [B, C, h, w]."""


class Denoiser:
    """Computes x0 from a network's output at (x, t), in float32 whatever its precision."""

    def __init__(self, network: Network, schedule: Schedule, prediction: Prediction) -> None:
        self.network = network
        self.schedule = schedule
        self.prediction = prediction

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the expected x0 of x [B, C, h, w] at the scalar time t."""
        t = t.to(x.device).expand(len(x))
        alpha, sigma = self.schedule.alpha_sigma(t, torch.promote_types(x.dtype, torch.float32))
        network_input = self.prediction.network_input(x, alpha, sigma)
        output = self.network(network_input, self.schedule.timestep(t)).to(x.dtype)
        return self.prediction.x0(x, output, alpha, sigma)
