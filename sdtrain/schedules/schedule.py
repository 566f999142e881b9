"""A schedule is log_snr as a function of time t in [0, 1]; alpha and sigma follow from it.

x_t = alpha x0 + sigma eps,  log_snr = ln(alpha^2 / sigma^2),  falling as t rises.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from sdtrain.errors import UserError

Curve = Callable[[Tensor], Tensor]
"""A function from a float64 tensor of any shape to one of the same shape."""


def curve_error(problem: str, keys: str, alternative: str = "") -> UserError:
    """Return the UserError for a schedule that cannot be used.

    problem: what is wrong with it. keys: the configuration keys that determine it, as in Schedule.
    alternative: another remedy than to change these keys, a phrase that begins with "or".
    """
    remedy = f"Change {keys}, {alternative}." if alternative else f"Change {keys}."
    return UserError(problem, key=keys.partition(" ")[0], remedy=remedy)


class Schedule:
    """The curve log_snr(t), its inverse, and the relation between alpha and sigma.

    The other rooms use a schedule through this class only.

    Args:
        name: shown in messages and tables.
        log_snr: maps t in [0, 1] to log_snr, strictly falling; it may be inf at t = 0 and -inf at
            t = 1. Any other curve raises UserError.
        time_of: the inverse of `log_snr`.
        num_timesteps: T >= 2; the network's input for time t is t (T - 1).
        discrete: whether training draws only the T points t = i / (T - 1), as for a table of betas.
        even_timesteps: whether samplers should visit evenly spaced timesteps, as for a table that
            was made for that; otherwise they space their steps by log_snr (`grids.default`).
        straight: whether alpha + sigma = 1, the straight path of flow matching, instead of alpha^2
            + sigma^2 = 1.
        keys: the configuration keys that determine the curve, "a" or "a or b", for errors.
    """

    def __init__(
        self,
        name: str,
        log_snr: Curve,
        time_of: Curve,
        *,
        num_timesteps: int = 1000,
        discrete: bool = False,
        even_timesteps: bool = False,
        straight: bool = False,
        keys: str = "schedule",
    ) -> None:
        if num_timesteps < 2:
            raise UserError("must be at least 2", key="schedule.num_timesteps", value=num_timesteps)
        self.name = name
        self.num_timesteps = num_timesteps
        self.discrete = discrete
        self.even_timesteps = even_timesteps
        self.straight = straight
        self._log_snr = log_snr
        self._time_of = time_of
        curve = self.log_snr(torch.linspace(0, 1, num_timesteps, dtype=torch.float64))
        falls = bool((curve[1:] < curve[:-1]).all())  # False where a value is NaN
        if not falls or not bool(curve[1:-1].isfinite().all()):
            raise curve_error(
                f"schedule={name}: log_snr must fall from every timestep to the next, and be "
                "finite between the ends",
                keys,
            )
        self.log_snr_max = curve[0].item()
        self.log_snr_min = curve[-1].item()

    def log_snr(self, t: Tensor) -> Tensor:
        """Return log_snr at times t in [0, 1], in the shape of t, float64."""
        return self._log_snr(t.double())

    def time_of(self, log_snr: Tensor, *, clamp: bool = False) -> Tensor:
        """Return the time at which the schedule has this log_snr, in the same shape, float64.

        Raises ValueError for a log_snr outside the schedule's range; with `clamp` it is clamped to
        the range instead.
        """
        log_snr = log_snr.double()
        if clamp:
            log_snr = log_snr.clamp(self.log_snr_min, self.log_snr_max)
        elif bool(((log_snr > self.log_snr_max) | (log_snr < self.log_snr_min)).any()):
            raise ValueError(
                f"log_snr lies outside the range [{self.log_snr_min:.4f}, {self.log_snr_max:.4f}] "
                f"of schedule={self.name}"
            )
        t = self._time_of(log_snr).clamp(0, 1)
        # The ends are exact.
        t = torch.where(log_snr <= self.log_snr_min, 1.0, t)
        return torch.where(log_snr >= self.log_snr_max, 0.0, t)

    def alpha_sigma(self, t: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Return (alpha, sigma), each [B, 1, 1, 1], at times t [B] or at a scalar t.

        They are exactly (0, 1) where log_snr is -inf. The computation is in float64, because in
        half precision the first timesteps would have no noise at all.
        """
        alpha, sigma = self.alpha_sigma_of(self.log_snr(t).reshape(-1, 1, 1, 1))
        return alpha.to(dtype), sigma.to(dtype)

    def alpha_sigma_of(self, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        """Return (alpha, sigma) at a float64 log_snr, in its shape.

        alpha / sigma = exp(log_snr / 2), and alpha^2 + sigma^2 = 1, or alpha + sigma = 1 for a
        straight path.
        """
        if self.straight:
            return (log_snr / 2).sigmoid(), (-log_snr / 2).sigmoid()
        return log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()

    def timestep(self, t: Tensor) -> Tensor:
        """Return the network's input for times t in [0, 1]: t * (num_timesteps - 1), float32."""
        return (t * (self.num_timesteps - 1)).float()

    def snap_to_points(self, t: Tensor) -> Tensor:
        """Map times in [0, 1] to the T points: floor(t T) / (T - 1).

        Intervals of equal length are mapped to each point.
        """
        last = self.num_timesteps - 1
        return (t * self.num_timesteps).floor().clamp(max=last) / last

    def modified(
        self,
        modifier: str,
        log_snr: Curve,
        time_of: Curve,
        keys: str,
        *,
        even_timesteps: bool = False,
    ) -> "Schedule":
        """Return a schedule with another curve that is otherwise the same.

        modifier: appended to the name. even_timesteps: whether the modifier leaves evenly spaced
        timesteps a good choice.
        """
        return Schedule(
            f"{self.name}+{modifier}",
            log_snr,
            time_of,
            num_timesteps=self.num_timesteps,
            discrete=self.discrete,
            even_timesteps=self.even_timesteps and even_timesteps,
            straight=self.straight,
            keys=keys,
        )
