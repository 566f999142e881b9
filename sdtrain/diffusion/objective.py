"""The training objective: noise the latents, ask the network, charge the loss. There is no second copy of this anywhere."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sdtrain.diffusion.forward import add_noise
from sdtrain.diffusion.losses import MSE
from sdtrain.diffusion.prediction import Prediction
from sdtrain.diffusion.times import Times
from sdtrain.diffusion.weighting import Weighting, charge
from sdtrain.diffusion.weighting.epsilon import Epsilon
from sdtrain.errors import UserError
from sdtrain.schedules import Schedule
from sdtrain.types import Losses

Network = Callable[[Tensor, Tensor], Tensor]
"""(x_t [B, C, h, w], timestep [B] float32) -> output [B, C, h, w]: the unet with its conditioning already bound."""


class WeightingError(UserError):
    """Another weighting would do."""


class Objective:
    """E[w J loss(target - output)] with J = (d eps / d output)^2 and the weight w said in squared error of epsilon.

    What cannot be trained raises UserError here, before any weight is loaded: a prediction from which x0 cannot be read where sampling
    starts, a product w J that is infinite somewhere, or nothing where sampling starts.
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
        self.schedule, self.prediction, self.weighting, self.times, self.loss = (
            schedule,
            prediction,
            weighting,
            times,
            loss or MSE(),
        )
        self.check()

    def __call__(
        self,
        network: Network,
        x0: Tensor,
        noise: Tensor,
        u: Tensor,
        input_noise: Tensor | None = None,
    ) -> Losses:
        """x0 and noise [B, C, h, w], u [B] uniforms in [0, 1). The loss is a mean over C, h, w.

        input_noise: what is added to x0 where that is not the noise to be predicted (sdtrain.diffusion.noise).
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
        """The same at given times t [B]."""
        error, alpha, sigma = self._error(network, x0, noise, t, input_noise)
        weight = charge(self.weighting, self.prediction, alpha, sigma).flatten().to(error.dtype)
        return Losses(per_sample=weight * self.loss(error).mean((1, 2, 3)), t=t)

    def epsilon_error(self, network: Network, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Mean squared error of epsilon [B] at times t [B], which means the same under every schedule, prediction, weighting and loss."""
        error, alpha, sigma = self._error(network, x0, noise, t)
        return charge(Epsilon(), self.prediction, alpha, sigma).flatten().to(
            error.dtype
        ) * error.square().mean((1, 2, 3))

    def _error(
        self,
        network: Network,
        x0: Tensor,
        noise: Tensor,
        t: Tensor,
        input_noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """target - output [B, C, h, w], and alpha and sigma [B, 1, 1, 1] in float64."""
        # float32 or better, whatever the network's precision: in bf16 the first timesteps would add no noise.
        dtype = torch.promote_types(x0.dtype, torch.float32)
        x0, noise, exact = (
            x0.to(dtype),
            noise.to(dtype),
            self.schedule.alpha_sigma(t, torch.float64),
        )
        alpha, sigma = (c.to(dtype) for c in exact)
        x = add_noise(x0, noise if input_noise is None else input_noise.to(dtype), alpha, sigma)
        output = network(
            self.prediction.network_input(x, alpha, sigma), self.schedule.timestep(t)
        ).to(dtype)
        return self.prediction.target(x0, noise, alpha, sigma) - output, *exact

    def check(self) -> None:
        # As the options are called: predictions by their class, weightings by their file.
        prediction, weighting = (
            type(self.prediction).__name__.lower(),
            type(self.weighting).__module__.rpartition(".")[2],
        )
        schedule = self.schedule.name
        last = self.schedule.alpha_sigma(torch.ones(1, dtype=torch.float64), torch.float64)
        if self.prediction.determinant(*last).item() == 0:
            raise UserError(
                f"prediction={prediction} cannot be read at t = 1, where schedule={schedule} has alpha = {last[0].item():g}: x is all noise there, and an "
                f"output that repeats it says nothing of x0. Set prediction=v or prediction=flow, or do without what takes alpha to 0: "
                f"modifiers=[zero_terminal_snr], schedule=flow, a beta of 1."
            )
        tails = torch.tensor([1e-9, 1e-6, 1 - 1e-6, 1 - 1e-9], dtype=torch.float64)
        u = torch.cat(
            [torch.linspace(0, 1, 2 * self.schedule.num_timesteps, dtype=torch.float64), tails]
        ).clamp(max=math.nextafter(1, 0))
        t = self.times(u, self.schedule)
        charged = charge(
            self.weighting, self.prediction, *self.schedule.alpha_sigma(t, torch.float64)
        ).flatten()
        remedy = "Choose another weighting (simple suits every prediction), or keep log_snr finite with modifiers=[clip] or another schedule."
        too_much = ~((charged >= 0) & (charged < 1e12))
        if bool(too_much.any()):
            at, by = t[too_much][0].item(), charged[too_much][0].item()
            raise WeightingError(
                f"weighting={weighting} with prediction={prediction} weighs the level t = {at:.4g} of schedule={schedule} by {by:.0e}, which is infinite or "
                f"as good as that. {remedy}"
            )
        if charged[t.argmax()].item() < 1e-9 * charged.median().item():
            raise WeightingError(
                f"weighting={weighting} with prediction={prediction} gives no weight to the level where sampling starts, t = {t.max().item():.4g} of "
                f"schedule={schedule}, so what is drawn first would never be learned. {remedy}"
            )
