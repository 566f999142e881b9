"""The training objective: add noise to the latents, evaluate the network, compute the loss.

It is implemented here only.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sdtrain.diffusion.forward import add_noise
from sdtrain.diffusion.losses import MSE
from sdtrain.diffusion.prediction import Prediction
from sdtrain.diffusion.times import Times
from sdtrain.diffusion.weighting import Weighting, output_weight
from sdtrain.diffusion.weighting.epsilon import Epsilon
from sdtrain.errors import UserError
from sdtrain.schedules import Schedule
from sdtrain.types import Losses

Network = Callable[[Tensor, Tensor], Tensor]
"""(x_t [B, C, h, w], timestep [B] float32) -> output [B, C, h, w].

The unet with its conditioning already applied.
"""


class WeightingError(UserError):
    """Raised for an objective that could be trained with another weighting."""


class Objective:
    """E[w J loss(target - output)] with J = (d eps / d output)^2.

    w is the weight on the squared error of epsilon. The constructor raises UserError for an
    objective that cannot be trained: a prediction that cannot recover x0 where sampling starts, or
    a product w J that is infinite somewhere or 0 where sampling starts.
    """

    def __init__(
        self,
        *,
        schedule: Schedule,
        prediction: Prediction,
        weighting: Weighting,
        times: Times,
        loss: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.schedule = schedule
        self.prediction = prediction
        self.weighting = weighting
        self.times = times
        self.loss = loss or MSE()
        self.check()

    def __call__(
        self,
        network: Network,
        x0: Tensor,
        noise: Tensor,
        u: Tensor,
        input_noise: Tensor | None = None,
    ) -> Losses:
        """Return the losses at the times that `self.times` makes of u, averaged over C, h, w.

        x0, noise: [B, C, h, w]. u: [B], uniforms in [0, 1). input_noise: the noise added to x0, if
        it is not the noise to be predicted (sdtrain.diffusion.noise).
        """
        return self.at(network, x0, noise, self.times(u, self.schedule), input_noise)

    def at(
        self,
        network: Network,
        x0: Tensor,
        noise: Tensor,
        t: Tensor,
        input_noise: Tensor | None = None,
    ) -> Losses:
        """Return the losses at given times t [B]."""
        error, alpha, sigma = self._error(network, x0, noise, t, input_noise)
        weight = (
            output_weight(self.weighting, self.prediction, alpha, sigma).flatten().to(error.dtype)
        )
        return Losses(per_sample=weight * self.loss(error).mean((1, 2, 3)), t=t)

    def epsilon_error(self, network: Network, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the mean squared error of epsilon [B] at times t [B].

        It means the same under every schedule, prediction, weighting and loss.
        """
        error, alpha, sigma = self._error(network, x0, noise, t)
        weight = output_weight(Epsilon(), self.prediction, alpha, sigma).flatten().to(error.dtype)
        return weight * error.square().mean((1, 2, 3))

    def _error(
        self,
        network: Network,
        x0: Tensor,
        noise: Tensor,
        t: Tensor,
        input_noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return target - output [B, C, h, w], and alpha and sigma [B, 1, 1, 1] in float64."""
        # At least float32, whatever the network's precision: in bf16 the first timesteps would have
        # no noise.
        dtype = torch.promote_types(x0.dtype, torch.float32)
        x0 = x0.to(dtype)
        noise = noise.to(dtype)
        exact_alpha, exact_sigma = self.schedule.alpha_sigma(t, torch.float64)
        alpha = exact_alpha.to(dtype)
        sigma = exact_sigma.to(dtype)
        added = noise if input_noise is None else input_noise.to(dtype)
        x_t = add_noise(x0, added, alpha, sigma)
        network_input = self.prediction.network_input(x_t, alpha, sigma)
        output = network(network_input, self.schedule.timestep(t)).to(dtype)
        error = self.prediction.target(x0, noise, alpha, sigma) - output
        return error, exact_alpha, exact_sigma

    def check(self) -> None:
        """Raise UserError if it cannot be trained, WeightingError if the weighting is why."""
        self._check_prediction()
        self._check_weighting()

    @property
    def _prediction_name(self) -> str:
        return type(self.prediction).__name__.lower()  # the name of its option

    def _check_prediction(self) -> None:
        alpha, sigma = self.schedule.alpha_sigma(torch.ones(1, dtype=torch.float64), torch.float64)
        if self.prediction.determinant(alpha, sigma).item() == 0:
            raise UserError(
                f"prediction={self._prediction_name} cannot recover x0 at t = 1, where "
                f"schedule={self.schedule.name} has alpha = {alpha.item():g}",
                key="prediction",
                remedy="Set prediction=v or prediction=flow, or avoid alpha = 0, which comes from "
                "modifiers=[zero_terminal_snr], schedule=flow or a beta of 1.",
            )

    def _check_weighting(self) -> None:
        """Evaluate w J on a dense grid of levels."""
        tails = torch.tensor([1e-9, 1e-6, 1 - 1e-6, 1 - 1e-9], dtype=torch.float64)
        even = torch.linspace(0, 1, 2 * self.schedule.num_timesteps, dtype=torch.float64)
        u = torch.cat([even, tails]).clamp(max=math.nextafter(1, 0))
        t = self.times(u, self.schedule)
        alpha, sigma = self.schedule.alpha_sigma(t, torch.float64)
        weights = output_weight(self.weighting, self.prediction, alpha, sigma).flatten()
        invalid = ~((weights >= 0) & (weights < 1e12))
        if bool(invalid.any()):
            bad_t = t[invalid][0].item()
            weight = weights[invalid][0].item()
            raise self._weighting_error(
                f"gives the level t = {bad_t:.4g} of schedule={self.schedule.name} a weight of "
                f"{weight:.0e}, which is effectively infinite"
            )
        if weights[t.argmax()].item() < 1e-9 * weights.median().item():
            raise self._weighting_error(
                f"gives no weight to the level where sampling starts, t = {t.max().item():.4g} of "
                f"schedule={self.schedule.name}, so the first sampling step would never be learned"
            )

    def _weighting_error(self, problem: str) -> WeightingError:
        name = type(self.weighting).__module__.rpartition(".")[2]  # the name of its option
        return WeightingError(
            f"weighting={name} with prediction={self._prediction_name} {problem}",
            key="weighting",
            remedy="Choose another weighting (simple suits every prediction), or keep log_snr "
            "finite with modifiers=[clip] or another schedule.",
        )
