"""Training by noise level: the mean loss and the number of samples in each bin of log_snr."""

import math

import torch
from torch import Tensor

from sdtrain.schedules import Schedule

EDGES = torch.arange(-12, 13, dtype=torch.float64)
"""Of the bins of log_snr; the first and the last also take what lies beyond them."""


def by_level(schedule: Schedule, losses: Tensor, times: Tensor) -> Tensor:
    """The sum of the losses in each bin and their number: losses, times [N] to [2, bins] float64.

    The result is on the CPU.
    """
    losses = losses.double().cpu()
    log_snr = schedule.log_snr(times.double().cpu())
    bins = torch.bucketize(log_snr, EDGES[1:-1])
    sums_and_counts = torch.zeros(2, len(EDGES) - 1, dtype=torch.float64)
    values = torch.stack([losses, torch.ones_like(losses)])
    return sums_and_counts.index_add_(1, bins, values)


def described(sums_and_counts: Tensor) -> dict[str, list[float | None]]:
    """What metrics.jsonl gets: the mean loss of each bin and the number of its samples.

    The mean is None for an empty bin and where it is not finite.
    """
    means = []
    counts = []
    for total, count in zip(*sums_and_counts.tolist(), strict=True):
        known = count and math.isfinite(total)
        means.append(float(f"{total / count:.6g}") if known else None)
        counts.append(int(count))
    return {"train/loss_by_level": means, "train/count_by_level": counts}
