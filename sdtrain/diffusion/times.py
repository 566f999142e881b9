"""The distributions from which training draws t.

Each maps uniforms, which are part of the batch, through its quantile function.

`stratified` does not change the distribution: the uniforms of one global batch are spread evenly
over [0, 1), while each by itself is still uniform. They are drawn where the batch is made
(sdtrain.data.draws), which reads this attribute.
"""

import math

import torch
from torch import Tensor
from torch.special import ndtr, ndtri

from sdtrain.errors import UserError
from sdtrain.schedules import Schedule


class Times:
    """A distribution of times.

    Args:
        continuous: for a schedule that is a table, draw from all of [0, 1] instead of its points;
            it has no effect on other schedules.
        stratified: see above.
    """

    def __init__(self, *, continuous: bool = False, stratified: bool = True) -> None:
        self.continuous = continuous
        self.stratified = stratified

    def __call__(self, u: Tensor, schedule: Schedule) -> Tensor:
        """Map uniforms u [B] in [0, 1) to times t [B], float64."""
        t = self.quantile(u.double(), schedule)
        return schedule.snap_to_points(t) if self.draws_points(schedule) else t

    def draws_points(self, schedule: Schedule) -> bool:
        """Return whether training on this schedule draws only the points of its table."""
        return schedule.discrete and not self.continuous

    def quantile(self, u: Tensor, schedule: Schedule) -> Tensor:
        """Map probabilities u in [0, 1] to times t in [0, 1]."""
        raise NotImplementedError

    def cdf(self, t: Tensor, schedule: Schedule) -> Tensor:
        """Return the probability below t: the inverse of `quantile`."""
        raise NotImplementedError


class Uniform(Times):
    """t uniform on [0, 1]."""

    def quantile(self, u: Tensor, schedule: Schedule) -> Tensor:
        return u

    def cdf(self, t: Tensor, schedule: Schedule) -> Tensor:
        return t


class Window(Times):
    """t uniform on [low, high], to train a network for a part of the noise levels."""

    def __init__(
        self, *, low: float, high: float, continuous: bool = False, stratified: bool = True
    ) -> None:
        super().__init__(continuous=continuous, stratified=stratified)
        if not 0 <= low < high <= 1:
            raise UserError(
                f"and times.high={high:g} must satisfy 0 <= low < high <= 1",
                key="times.low",
                value=low,
            )
        self.low = low
        self.high = high

    def quantile(self, u: Tensor, schedule: Schedule) -> Tensor:
        return self.low + (self.high - self.low) * u

    def cdf(self, t: Tensor, schedule: Schedule) -> Tensor:
        return ((t - self.low) / (self.high - self.low)).clamp(0, 1)


def _check_normal(mean: float, std: float) -> None:
    """Raise UserError for a mean or standard deviation that a normal distribution cannot have."""
    if not math.isfinite(mean):
        raise UserError("must be finite", key="times.mean", value=mean)
    if not 0 < std < math.inf:
        raise UserError("must be above 0, and finite", key="times.std", value=std)


class LogitNormal(Times):
    """ln(t / (1 - t)) is normal (Esser et al. 2024, eq. 19)."""

    def __init__(
        self,
        *,
        mean: float = 0.0,
        std: float = 1.0,
        continuous: bool = False,
        stratified: bool = True,
    ) -> None:
        super().__init__(continuous=continuous, stratified=stratified)
        _check_normal(mean, std)
        self.mean = mean
        self.std = std

    def quantile(self, u: Tensor, schedule: Schedule) -> Tensor:
        return (self.mean + self.std * ndtri(u)).sigmoid()

    def cdf(self, t: Tensor, schedule: Schedule) -> Tensor:
        return ndtr((torch.logit(t) - self.mean) / self.std)


class LogNormal(Times):
    """ln(sigma / alpha) is normal (Karras et al. 2022, table 1), truncated to the schedule's range.

    It draws the same noise levels under every schedule.
    """

    def __init__(
        self,
        *,
        mean: float = -1.2,
        std: float = 1.2,
        continuous: bool = False,
        stratified: bool = True,
    ) -> None:
        super().__init__(continuous=continuous, stratified=stratified)
        _check_normal(mean, std)
        self.mean = mean
        self.std = std

    def _normal_cdf(self, log_snr: Tensor | float) -> Tensor:
        return ndtr((-torch.as_tensor(log_snr, dtype=torch.float64) / 2 - self.mean) / self.std)

    def _end_probabilities(self, schedule: Schedule) -> tuple[float, float]:
        """Return the probabilities below t = 0 and below t = 1 before truncation.

        Raises UserError if nearly none lies between.
        """
        low = self._normal_cdf(schedule.log_snr_max).item()
        high = self._normal_cdf(schedule.log_snr_min).item()
        if high - low < 1e-6:
            raise UserError(
                f"lies so far from the noise levels of schedule={schedule.name} that nothing of "
                "the distribution is left",
                key="times.mean",
                value=self.mean,
                remedy="Change times.mean.",
            )
        return low, high

    def quantile(self, u: Tensor, schedule: Schedule) -> Tensor:
        low, high = self._end_probabilities(schedule)
        log_snr = -2 * (self.mean + self.std * ndtri(low + (high - low) * u))
        return schedule.time_of(log_snr, clamp=True)

    def cdf(self, t: Tensor, schedule: Schedule) -> Tensor:
        low, high = self._end_probabilities(schedule)
        return (self._normal_cdf(schedule.log_snr(t)) - low) / (high - low)
