"""The progress of a training run: the one object that the training loop and its callbacks share."""

import math
from dataclasses import dataclass

import lightning.pytorch as L
from torch import Tensor


@dataclass
class StepResult:
    """The numbers of an optimizer step; tensors stay on the device, so that the host need not wait.

    loss: the sum of the losses of all samples over all ranks, even if not finite. norm: the norm
    of the gradient before clipping, even if not finite. shown_norm: the norm, or NaN if the step
    was cancelled. applied: False for a step that is known to be skipped.
    """

    loss: Tensor
    norm: Tensor
    shown_norm: Tensor
    applied: bool = True


@dataclass
class Progress:
    """Progress is measured in images: budgets, intervals and the position in the data.

    The module writes `images_seen`, `per_sample`, `times`, `step` and `skipped_steps`; `Stopping`
    writes `ends_at`; callbacks read. The datamodule saves and restores `images_seen`.

    Attributes:
        batch_size: images per optimizer step, over all ranks and micro-batches.
        max_images: the length of the run.
        images_seen: images of all optimizer steps so far, over all ranks; within an accumulation
            window also those of its micro-batches so far.
        ends_at: images_seen at which the run ends before max_images.
        per_sample: losses [B] of the micro-batch that just ended, on this rank.
        times: the times t [B] of these samples; None for an autoencoder, which has none.
        step: result of the optimizer step that just ended.
        skipped_steps: number of steps skipped because their loss or gradient was not finite.
    """

    batch_size: int
    max_images: int
    images_seen: int = 0
    ends_at: float = math.inf
    per_sample: Tensor | None = None
    times: Tensor | None = None
    step: StepResult | None = None
    skipped_steps: int = 0

    @property
    def ended(self) -> bool:
        """Whether the optimizer step that just ended was the last one."""
        return self.images_seen >= min(self.max_images, self.ends_at)

    def is_due(self, every: int) -> bool:
        """Return whether the optimizer step that just ended crossed a multiple of `every` images;
        never for every = 0.
        """
        if every <= 0:
            return False
        before = self.images_seen - self.batch_size
        return self.images_seen // every > before // every


def window_ended(trainer: L.Trainer) -> bool:
    """Return whether the micro-batch that just ended was the last of its accumulation window, so
    that the optimizer has made a step.
    """
    return not trainer.fit_loop._should_accumulate()
