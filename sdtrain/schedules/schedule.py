"""A schedule is log_snr as a function of time t in [0, 1]; alpha and sigma are views of it.

x_t = alpha x0 + sigma eps,  log_snr = ln(alpha^2 / sigma^2),  falling as t rises.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from sdtrain.errors import UserError

Curve = Callable[[Tensor], Tensor]
"""float64 tensor of any shape to one of the same shape."""


def curve_error(problem: str, keys: str, or_else: str = "") -> UserError:
    """The error of a curve that cannot be used.

    keys: as in Schedule; or_else: what would do beside changing them.
    """
    remedy = f"Change {keys}, {or_else}." if or_else else f"Change {keys}."
    return UserError(problem, key=keys.partition(" ")[0], remedy=remedy)


class Schedule:
    """A curve, its inverse, and the relation of alpha to sigma.

    Everything that the other rooms may ask of a schedule.

    Args:
        name: for messages and tables.
        log_snr: t in [0, 1] to log_snr, falling strictly; it may reach inf at t = 0 and -inf at t =
            1. Anything else raises UserError.
        time_of: its inverse.
        num_timesteps: T >= 2; the network is fed t (T - 1).
        points: training draws the T points t = i / (T - 1) alone, as for a table of betas.
        even_timesteps: whether a sampler does well to visit evenly spaced timesteps, as in a table
            whose author spread them so; else it spaces its steps by log_snr (`grids.default`).
        straight: alpha + sigma = 1, the straight path of flow matching, instead of alpha^2 +
            sigma^2 = 1.
        keys: the configuration keys that the curve comes from, "a" or "a or b", for errors.
    """

    def __init__(
        self,
        name: str,
        log_snr: Curve,
        time_of: Curve,
        *,
        num_timesteps: int = 1000,
        points: bool = False,
        even_timesteps: bool = False,
        straight: bool = False,
        keys: str = "schedule",
    ) -> None:
        if num_timesteps < 2:
            raise UserError("must be at least 2", key="schedule.num_timesteps", value=num_timesteps)
        self.name = name
        self.num_timesteps = num_timesteps
        self.points = points
        self.even_timesteps = even_timesteps
        self.straight = straight
        self._log_snr = log_snr
        self._time_of = time_of
        curve = self.log_snr(torch.linspace(0, 1, num_timesteps, dtype=torch.float64))
        falls = bool((curve[1:] < curve[:-1]).all())  # NaN falls nowhere
        if not falls or not bool(curve[1:-1].isfinite().all()):
            raise curve_error(
                f"schedule={name}: log_snr must fall from every timestep to the next, and be "
                "finite between the ends",
                keys,
            )
        self.log_snr_max = curve[0].item()
        self.log_snr_min = curve[-1].item()

    def log_snr(self, t: Tensor) -> Tensor:
        """log_snr at times t in [0, 1], same shape, float64."""
        return self._log_snr(t.double())

    def time_of(self, log_snr: Tensor, *, clamp: bool = False) -> Tensor:
        """The inverse of log_snr, same shape, float64.

        What lies outside the schedule's range raises ValueError; with clamp it is taken to its end.
        """
        wanted = log_snr.double()
        if clamp:
            wanted = wanted.clamp(self.log_snr_min, self.log_snr_max)
        elif bool(((wanted > self.log_snr_max) | (wanted < self.log_snr_min)).any()):
            raise ValueError(
                f"log_snr lies outside the range [{self.log_snr_min:.4f}, {self.log_snr_max:.4f}] "
                f"of schedule={self.name}"
            )
        t = self._time_of(wanted).clamp(0, 1)
        # The ends exactly.
        t = torch.where(wanted <= self.log_snr_min, 1.0, t)
        return torch.where(wanted >= self.log_snr_max, 0.0, t)

    def alpha_sigma(self, t: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at times t [B] or a scalar, each [B, 1, 1, 1].

        Exactly (0, 1) where log_snr is -inf. Computed in float64: half precision would add no noise
        at all at the first timesteps.
        """
        alpha, sigma = self.split(self.log_snr(t).reshape(-1, 1, 1, 1))
        return alpha.to(dtype), sigma.to(dtype)

    def split(self, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        """log_snr, float64, to (alpha, sigma) of the same shape.

        alpha / sigma = exp(log_snr / 2), and alpha^2 + sigma^2 = 1, or alpha + sigma = 1 where
        straight.
        """
        if self.straight:
            return (log_snr / 2).sigmoid(), (-log_snr / 2).sigmoid()
        return log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()

    def timestep(self, t: Tensor) -> Tensor:
        """What the network is fed for t: t (T - 1), float32."""
        return (t * (self.num_timesteps - 1)).float()

    def nearest_point(self, t: Tensor) -> Tensor:
        """Times in [0, 1] to the T points: floor(t T) / (T - 1).

        An equal stretch of time goes to each point.
        """
        last = self.num_timesteps - 1
        return (t * self.num_timesteps).floor().clamp(max=last) / last

    def modified(
        self,
        how: str,
        log_snr: Curve,
        time_of: Curve,
        keys: str,
        *,
        even_timesteps: bool = False,
    ) -> "Schedule":
        """The same in everything but the curve.

        even_timesteps: whether those of a schedule that has them stay evenly spread.
        """
        return Schedule(
            f"{self.name}+{how}",
            log_snr,
            time_of,
            num_timesteps=self.num_timesteps,
            points=self.points,
            even_timesteps=self.even_timesteps and even_timesteps,
            straight=self.straight,
            keys=keys,
        )
