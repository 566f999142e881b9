"""The training loss by noise level: mean loss and number of samples in each bin of log_snr."""

import math

import torch
from torch import Tensor

from sdtrain.schedules import Schedule

EDGES = torch.arange(-12, 13, dtype=torch.float64)
"""Edges of the bins of log_snr; the first and the last bin include everything beyond them."""


def bin_losses(schedule: Schedule, losses: Tensor, times: Tensor) -> Tensor:
    """Return the sum and the number of the losses in each bin, [2, bins] float64 on the CPU, for
    losses, times [N].
    """
    losses = losses.double().cpu()
    log_snr = schedule.log_snr(times.double().cpu())
    bins = torch.bucketize(log_snr, EDGES[1:-1])
    sums_and_counts = torch.zeros(2, len(EDGES) - 1, dtype=torch.float64)
    values = torch.stack([losses, torch.ones_like(losses)])
    return sums_and_counts.index_add_(1, bins, values)


def level_metrics(sums_and_counts: Tensor) -> dict[str, list[float | None]]:
    """Return the entries of metrics.jsonl: the mean loss of each bin and the number of its samples.

    The mean is None if the bin is empty or the mean is not finite.
    """
    means = []
    counts = []
    for total, count in zip(*sums_and_counts.tolist(), strict=True):
        if count and math.isfinite(total):
            means.append(float(f"{total / count:.6g}"))
        else:
            means.append(None)
        counts.append(int(count))
    return {"train/loss_by_level": means, "train/count_by_level": counts}
