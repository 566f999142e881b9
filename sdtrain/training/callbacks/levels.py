"""Training by noise level: of the losses and times that the ordinary steps have left behind, without a look at the device before a line is due."""

import math

import torch
from torch import Tensor

from sdtrain.schedules import Schedule

EDGES = torch.arange(-12, 13, dtype=torch.float64)
"""Of the bins of log_snr; the first and the last also take what lies beyond them."""


def by_level(schedule: Schedule, losses: Tensor, times: Tensor) -> Tensor:
    """losses and times [N] to [2, bins] float64 on the CPU: the sum of the losses in each bin of log_snr, and how many they are."""
    losses, log_snr = losses.double().cpu(), schedule.log_snr(times.double().cpu())
    places = torch.bucketize(log_snr, EDGES[1:-1])
    found = torch.zeros(2, len(EDGES) - 1, dtype=torch.float64)
    return found.index_add_(1, places, torch.stack([losses, torch.ones_like(losses)]))


def described(found: Tensor) -> dict[str, list[float | None]]:
    """What a line of numbers says of it: the mean loss of each bin, None for an empty one and where it is not finite, and the realised histogram."""
    sums, counts = found.tolist()
    means = [
        float(f"{total / count:.6g}") if count and math.isfinite(total) else None
        for total, count in zip(sums, counts, strict=True)
    ]
    return {"train/loss_by_level": means, "train/count_by_level": [int(count) for count in counts]}
