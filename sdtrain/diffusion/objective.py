"""The training objective: noise the latents, ask the network, charge the loss. There is no second copy of this anywhere."""

from collections.abc import Callable

from torch import Tensor

from sdtrain.diffusion.forward import add_noise
from sdtrain.diffusion.prediction import Prediction
from sdtrain.diffusion.times import Uniform
from sdtrain.diffusion.weighting import Weighting
from sdtrain.schedules import Schedule
from sdtrain.types import Losses

Network = Callable[[Tensor, Tensor], Tensor]
"""(x_t [B, C, h, w], timestep [B] float32) -> output [B, C, h, w]: the unet with its conditioning already bound."""


class Objective:
    """E[w J |target - output|^2] with J = (d eps / d output)^2 and the weight w said in squared error of epsilon."""

    def __init__(self, *, schedule: Schedule, prediction: Prediction, weighting: Weighting, times: Uniform) -> None:
        self.schedule, self.prediction, self.weighting, self.times = schedule, prediction, weighting, times

    def __call__(self, network: Network, x0: Tensor, noise: Tensor, u: Tensor) -> Losses:
        """x0 and noise [B, C, h, w], u [B] uniforms in [0, 1). The squared error is a mean over C, h, w."""
        return self.at(network, x0, noise, self.times(u, self.schedule))

    def at(self, network: Network, x0: Tensor, noise: Tensor, t: Tensor) -> Losses:
        """The same at given times t [B]."""
        # float32 whatever the network's precision: in bf16 the first timesteps would add no noise.
        x0, noise = x0.float(), noise.float()
        alpha, sigma = self.schedule.alpha_sigma(t)
        output = network(add_noise(x0, noise, alpha, sigma), self.schedule.timestep(t)).float()
        error = (self.prediction.target(x0, noise, alpha, sigma) - output).square().mean((1, 2, 3))
        jacobian = self.prediction.jacobian(alpha, sigma).flatten()
        weight = self.weighting(self.schedule.log_snr(t).float(), jacobian) * jacobian
        return Losses(per_sample=weight * error, t=t)
