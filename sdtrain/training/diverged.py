"""Finds optimizer steps whose loss or gradient was not finite, and makes the error for them."""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from sdtrain.errors import DivergedError
from sdtrain.training.progress import Progress

MAX_NAMED = 8
"""Largest number of samples that the error names."""

SampleLoss = tuple[int, float, float] | tuple[int, float]
"""(ordinal, loss, time) of a sample, or (ordinal, loss) for an autoencoder."""


@dataclass
class MicroBatchLosses:
    """The losses of a micro-batch on this rank.

    Tensors [B] on the device: ordinals int64, losses, and times; times is None for an autoencoder.
    """

    ordinals: Tensor
    losses: Tensor
    times: Tensor | None

    def rows(self) -> list[SampleLoss]:
        """Return (ordinal, loss, time) of each sample, without the time for an autoencoder."""
        ordinals = self.ordinals.tolist()
        losses = self.losses.tolist()
        if self.times is None:
            return list(zip(ordinals, losses, strict=True))
        return list(zip(ordinals, losses, self.times.tolist(), strict=True))


@dataclass
class FinishedStep:
    """An optimizer step, with its loss and gradient norm on the device.

    images_seen: after the step. loss: the sum over all its samples. norm: the gradient norm before
    clipping.
    """

    images_seen: int
    loss: Tensor
    norm: Tensor
    micro_batches: list[MicroBatchLosses]


@dataclass
class BadStep:
    """A step whose loss or gradient norm was not finite, with both on the host."""

    images_seen: int
    loss: float
    norm: float
    micro_batches: list[MicroBatchLosses]


def bad_steps(steps: list[FinishedStep]) -> list[BadStep]:
    """Return the steps that were not finite, the same on all ranks. Waits for the device once."""
    if not steps:
        return []
    numbers = []
    for step in steps:
        numbers += [step.loss, step.norm]
    on_host = torch.stack(numbers).view(-1, 2).tolist()
    bad = []
    for step, (loss, norm) in zip(steps, on_host, strict=True):
        if not math.isfinite(loss + norm):
            bad.append(BadStep(step.images_seen, loss, norm, step.micro_batches))
    return bad


def divergence_error(
    bad: list[BadStep],
    num_steps: int,
    *,
    progress: Progress,
    lr: float,
    world_size: int,
    has_checkpoint: bool,
) -> DivergedError:
    """Return the error for the bad ones among the last `num_steps` steps. It names some samples of
    the first one.

    All ranks must call it together.

    Args:
        lr: the peak learning rate.
        has_checkpoint: whether the run has a checkpoint, which then is from before those steps.
    """
    first = bad[0]
    named = _samples_to_name(first, world_size)
    samples = ", ".join(str(row[0]) for row in named)
    times = ""
    if len(named[0]) > 2:
        times = f", t = {', '.join(f'{row[2]:.3g}' for row in named)}"
    size = progress.batch_size
    step = (
        f"first in step {first.images_seen // size}, which ended at {first.images_seen} images "
        f"(samples {samples}{times}; loss {first.loss / size:g}, gradient norm {first.norm:g})"
    )
    saved = ", and the last checkpoint is good" if has_checkpoint else ""
    return DivergedError(
        f"The loss or the gradient was not finite in {len(bad)} of the last {num_steps} "
        f"optimizer steps, {step}. These steps have changed no weight{saved}",
        key="optimizer.lr",
        remedy=f"Lower optimizer.lr (now {lr:g}) or trainer.gradient_clip, check those samples, "
        "or allow up to n such steps to be skipped with trainer.max_skipped=n.",
    )


def _samples_to_name(step: BadStep, world_size: int) -> list[SampleLoss]:
    """Return samples on any rank whose own loss was not finite; if all were finite, any samples."""
    own: list[SampleLoss] = []
    for losses in step.micro_batches:
        own += losses.rows()
    by_rank = [own]
    if world_size > 1:
        by_rank = [None] * world_size
        dist.all_gather_object(by_rank, own)
    rows = sorted(sum(by_rank, []))
    not_finite = [row for row in rows if not math.isfinite(row[1])]
    return (not_finite or rows)[:MAX_NAMED]
