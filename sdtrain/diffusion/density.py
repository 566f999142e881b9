"""The density with which training draws noise levels."""

import torch
from torch import Tensor

from sdtrain.diffusion.times import Times
from sdtrain.schedules import Schedule

STEP = 1e-6
"""The step in log_snr of the finite difference below."""


class Density:
    """The density of log_snr under a schedule and a distribution of times.

    |d cdf(t(log_snr)) / d log_snr|. Where training draws the points of a table, the probability of
    each point is spread half way to its neighbours, so that sums over the points are trapezoid sums
    over log_snr.
    """

    def __init__(self, schedule: Schedule, times: Times) -> None:
        self.schedule = schedule
        self.times = times
        self._point_densities: dict[torch.device, Tensor] = {}
        if times.draws_points(schedule):
            size = schedule.num_timesteps
            probability = times.cdf(
                torch.arange(size + 1, dtype=torch.float64) / size, schedule
            ).diff()
            log_snr = schedule.log_snr(torch.arange(size, dtype=torch.float64) / (size - 1))
            edges = torch.cat([log_snr[:1], (log_snr[1:] + log_snr[:-1]) / 2, log_snr[-1:]])
            # The density is 0 where the distance is infinite.
            density = (probability / -edges.diff()).nan_to_num(0.0)
            self._point_densities[torch.device("cpu")] = density

    def __call__(self, log_snr: Tensor) -> Tensor:
        """Return the density at log_snr, in its shape, float64.

        A log_snr outside the schedule's range is clamped to it.
        """
        if self._point_densities:
            t = self.schedule.time_of(log_snr, clamp=True)
            points = (t * (self.schedule.num_timesteps - 1)).round().long()
            return self._densities_on(log_snr.device)[points]
        # A curve has ends and may have corners, where autograd has no slope: take the mean of the
        # slopes slightly to the left and right.
        low = self.schedule.log_snr_min + 2 * STEP
        high = self.schedule.log_snr_max - 2 * STEP
        level = log_snr.detach().double().clamp(low, high)
        with torch.enable_grad():
            beside = torch.stack([level - STEP, level + STEP]).requires_grad_()
            probability = self.times.cdf(self.schedule.time_of(beside, clamp=True), self.schedule)
            return -torch.autograd.grad(probability.sum(), beside)[0].mean(0)

    def _densities_on(self, device: torch.device) -> Tensor:
        """Return the densities of the points, on a device."""
        if device not in self._point_densities:
            # Cached per device, because a copy in every step would make the GPU wait for the CPU.
            self._point_densities[device] = self._point_densities[torch.device("cpu")].to(device)
        return self._point_densities[device]
