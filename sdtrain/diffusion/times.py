"""The base laws by which training draws t. Each is a quantile function of the uniforms that travel with the batch.

stratified is a proposal, not part of the law: the uniforms of one global batch are spread evenly over [0, 1), each still uniform by
itself. They are made where the batch is made (sdtrain.data.draws), which reads this attribute.
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
        continuous: on a schedule that is a table, draw from all of [0, 1] instead of its points; other schedules have no points.
        stratified: see above.
    """

    def __init__(self, *, continuous: bool = False, stratified: bool = True) -> None:
        self.continuous, self.stratified = continuous, stratified

    def __call__(self, u: Tensor, schedule: Schedule) -> Tensor:
        """Uniforms u [B] in [0, 1) to times t [B], float64."""
        t = self.quantile(u.double(), schedule)
        return schedule.nearest_point(t) if self.on_points(schedule) else t

    def on_points(self, schedule: Schedule) -> bool:
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
            raise ValueError(
                f"times.low={low:g} and times.high={high:g} must be 0 <= low < high <= 1."
            )
        self.low, self.high = low, high

    def quantile(self, u: Tensor, schedule: Schedule) -> Tensor:
        return self.low + (self.high - self.low) * u

    def cdf(self, t: Tensor, schedule: Schedule) -> Tensor:
        return ((t - self.low) / (self.high - self.low)).clamp(0, 1)


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
        if not 0 < std < math.inf or not math.isfinite(mean):
            raise ValueError(
                f"times.mean={mean:g} must be a number, and times.std={std:g} above 0."
            )
        self.mean, self.std = mean, std

    def quantile(self, u: Tensor, schedule: Schedule) -> Tensor:
        return (self.mean + self.std * ndtri(u)).sigmoid()

    def cdf(self, t: Tensor, schedule: Schedule) -> Tensor:
        return ndtr((torch.logit(t) - self.mean) / self.std)


class LogNormal(Times):
    """ln(sigma / alpha) normal (Karras et al. 2022, table 1), cut to the schedule's range: the same levels under every schedule."""

    def __init__(
        self,
        *,
        mean: float = -1.2,
        std: float = 1.2,
        continuous: bool = False,
        stratified: bool = True,
    ) -> None:
        super().__init__(continuous=continuous, stratified=stratified)
        if not 0 < std < math.inf or not math.isfinite(mean):
            raise ValueError(
                f"times.mean={mean:g} must be a number, and times.std={std:g} above 0."
            )
        self.mean, self.std = mean, std

    def _normal_cdf(self, log_snr: Tensor | float) -> Tensor:
        return ndtr((-torch.as_tensor(log_snr, dtype=torch.float64) / 2 - self.mean) / self.std)

    def _ends(self, schedule: Schedule) -> tuple[float, float]:
        low, high = (
            self._normal_cdf(schedule.log_snr_max).item(),
            self._normal_cdf(schedule.log_snr_min).item(),
        )
        if high - low < 1e-6:
            raise UserError(
                f"times.mean={self.mean:g} lies so far from the levels of schedule={schedule.name} that none of the law is left. Change it."
            )
        return low, high

    def quantile(self, u: Tensor, schedule: Schedule) -> Tensor:
        low, high = self._ends(schedule)
        return schedule.time_of(
            -2 * (self.mean + self.std * ndtri(low + (high - low) * u)), clamp=True
        )

    def cdf(self, t: Tensor, schedule: Schedule) -> Tensor:
        low, high = self._ends(schedule)
        return (self._normal_cdf(schedule.log_snr(t)) - low) / (high - low)
