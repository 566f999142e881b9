"""Where a training run stands: the one object that the loop and its callbacks share."""

import math
from dataclasses import dataclass

import lightning.pytorch as L
from torch import Tensor


@dataclass
class StepResult:
    """What an optimizer step came to; tensors are on the device, so that nothing waits for them.

    loss: the sum of the losses of all its samples over all ranks. norm: of the gradient before
    clipping; both as they were, finite or not. shown_norm: the norm, NaN where the step was
    cancelled. applied: False for a step that is known to be left out.
    """

    loss: Tensor
    norm: Tensor
    shown_norm: Tensor
    applied: bool = True


@dataclass
class Progress:
    """Images are the measure of progress: budgets, intervals and the position in the data are
    counted in them.

    The module writes `images_seen`, `per_sample`, `times`, `step` and `skipped_steps`; `stopping`
    writes `ends_at`; callbacks read. The datamodule saves and restores `images_seen`.

    Attributes:
        batch_size: images of one optimizer step, over all ranks and micro-batches.
        max_images: the run's budget.
        images_seen: by the optimizer steps so far, over all ranks; within a window, by its
            micro-batches too.
        ends_at: images at which the run ends although its budget is not used up.
        per_sample: losses [B] of the micro-batch that just ended, on this rank.
        times: their times t [B]; None for an autoencoder, which has none.
        step: of the optimizer step that just ended.
        skipped_steps: steps that were left out because their loss or gradient was not finite.
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
        """Whether the optimizer step that just ended was the last."""
        return self.images_seen >= min(self.max_images, self.ends_at)

    def is_due(self, every: int) -> bool:
        """Whether the optimizer step that just ended crossed a multiple of `every` images. every =
        0 is never.
        """
        if every <= 0:
            return False
        before = self.images_seen - self.batch_size
        return self.images_seen // every > before // every


def window_ended(trainer: L.Trainer) -> bool:
    """Whether the micro-batch that just ended was the last of its accumulation window, so that the
    optimizer has stepped.
    """
    return not trainer.fit_loop._should_accumulate()
