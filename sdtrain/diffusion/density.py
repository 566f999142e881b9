"""How often training visits a level."""

import torch
from torch import Tensor

from sdtrain.diffusion.times import Times
from sdtrain.schedules import Schedule

HAIR = 1e-6
"""A small step of log_snr."""


class Density:
    """The density of log_snr under a schedule and the base law of the times.

    |d cdf(t(log_snr)) / d log_snr|. Where training draws the points of a table, the share of each
    point is spread over half the way to its neighbours, so that sums over the points are trapezoid
    sums over log_snr.
    """

    def __init__(self, schedule: Schedule, times: Times) -> None:
        self.schedule = schedule
        self.times = times
        self._of_point: dict[torch.device, Tensor] = {}
        if times.on_points(schedule):
            size = schedule.num_timesteps
            share = times.cdf(torch.arange(size + 1, dtype=torch.float64) / size, schedule).diff()
            log_snr = schedule.log_snr(torch.arange(size, dtype=torch.float64) / (size - 1))
            edges = torch.cat([log_snr[:1], (log_snr[1:] + log_snr[:-1]) / 2, log_snr[-1:]])
            # No density where the way is infinite.
            density = (share / -edges.diff()).nan_to_num(0.0)
            self._of_point[torch.device("cpu")] = density

    def __call__(self, log_snr: Tensor) -> Tensor:
        """The density at log_snr of any shape: the same shape, float64.

        What lies outside the schedule's range is taken to its end.
        """
        if self._of_point:
            t = self.schedule.time_of(log_snr, clamp=True)
            points = (t * (self.schedule.num_timesteps - 1)).round().long()
            return self._on(log_snr.device)[points]
        # A curve has ends and may have corners, where autograd knows no slope: the mean of those a
        # hair to either side.
        low = self.schedule.log_snr_min + 2 * HAIR
        high = self.schedule.log_snr_max - 2 * HAIR
        level = log_snr.detach().double().clamp(low, high)
        with torch.enable_grad():
            beside = torch.stack([level - HAIR, level + HAIR]).requires_grad_()
            share = self.times.cdf(self.schedule.time_of(beside, clamp=True), self.schedule)
            return -torch.autograd.grad(share.sum(), beside)[0].mean(0)

    def _on(self, device: torch.device) -> Tensor:
        """The density at the points, on a device."""
        if device not in self._of_point:
            # Kept per device: a copy in every step would wait for the host.
            self._of_point[device] = self._of_point[torch.device("cpu")].to(device)
        return self._of_point[device]
