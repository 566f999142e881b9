"""The base laws by which training draws t.

Each is a quantile function of the uniforms that travel with the batch.

stratified is a proposal, not part of the law: the uniforms of one global batch are spread evenly
over [0, 1), each still uniform by itself. They are made where the batch is made
(sdtrain.data.draws), which reads this attribute.
"""

import math

import torch
from torch import Tensor
from torch.special import ndtr, ndtri

from sdtrain.errors import UserError
from sdtrain.schedules import Schedule


class Times:
    """Uniforms to times.

    Args:
        continuous: on a schedule that is a table, draw from all of [0, 1] instead of its points;
            other schedules have no points.
        stratified: see above.
    """

    def __init__(self, *, continuous: bool = False, stratified: bool = True) -> None:
        self.continuous = continuous
        self.stratified = stratified

    def __call__(self, u: Tensor, schedule: Schedule) -> Tensor:
        """Uniforms u [B] in [0, 1) to times t [B], float64."""
        t = self.quantile(u.double(), schedule)
        return schedule.nearest_point(t) if self.on_points(schedule) else t

    def on_points(self, schedule: Schedule) -> bool:
        """Whether training on this schedule draws its points alone."""
        return schedule.points and not self.continuous

    def quantile(self, u: Tensor, schedule: Schedule) -> Tensor:
        """u in [0, 1] to t in [0, 1]."""
        raise NotImplementedError

    def cdf(self, t: Tensor, schedule: Schedule) -> Tensor:
        """Its inverse: the share of the law below t."""
        raise NotImplementedError


class Uniform(Times):
    """t uniform on [0, 1]."""

    def quantile(self, u: Tensor, schedule: Schedule) -> Tensor:
        return u

    def cdf(self, t: Tensor, schedule: Schedule) -> Tensor:
        return t


class Window(Times):
    """t uniform on [low, high]: a network for some of the noise levels alone."""

    def __init__(
        self, *, low: float, high: float, continuous: bool = False, stratified: bool = True
    ) -> None:
        super().__init__(continuous=continuous, stratified=stratified)
        if not 0 <= low < high <= 1:
            raise UserError(
                f"and times.high={high:g} must be 0 <= low < high <= 1", key="times.low", value=low
            )
        self.low = low
        self.high = high

    def quantile(self, u: Tensor, schedule: Schedule) -> Tensor:
        return self.low + (self.high - self.low) * u

    def cdf(self, t: Tensor, schedule: Schedule) -> Tensor:
        return ((t - self.low) / (self.high - self.low)).clamp(0, 1)


def _check_normal(mean: float, std: float) -> None:
    """Raises UserError for what is no mean or no standard deviation."""
    if not math.isfinite(mean):
        raise UserError("must be a number", key="times.mean", value=mean)
    if not 0 < std < math.inf:
        raise UserError("must be above 0, and finite", key="times.std", value=std)


class LogitNormal(Times):
    """ln(t / (1 - t)) normal (Esser et al. 2024, eq. 19)."""

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
    """ln(sigma / alpha) normal (Karras et al. 2022, table 1), cut to the schedule's range.

    The same levels under every schedule.
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

    def _ends(self, schedule: Schedule) -> tuple[float, float]:
        """The shares of the law below t = 0 and below t = 1. UserError where none lies between."""
        low = self._normal_cdf(schedule.log_snr_max).item()
        high = self._normal_cdf(schedule.log_snr_min).item()
        if high - low < 1e-6:
            raise UserError(
                f"lies so far from the levels of schedule={schedule.name} that none of the law is "
                "left",
                key="times.mean",
                value=self.mean,
                remedy="Change it.",
            )
        return low, high

    def quantile(self, u: Tensor, schedule: Schedule) -> Tensor:
        low, high = self._ends(schedule)
        log_snr = -2 * (self.mean + self.std * ndtri(low + (high - low) * u))
        return schedule.time_of(log_snr, clamp=True)

    def cdf(self, t: Tensor, schedule: Schedule) -> Tensor:
        low, high = self._ends(schedule)
        return (self._normal_cdf(schedule.log_snr(t)) - low) / (high - low)
