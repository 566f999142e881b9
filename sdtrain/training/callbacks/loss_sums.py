"""Sums the losses of all samples since the last line of metrics.jsonl, also by noise level."""

import lightning.pytorch as L
import torch
from torch import Tensor

from sdtrain.training.callbacks.levels import bin_losses
from sdtrain.training.diverged import FinishedStep, MicroBatchLosses
from sdtrain.training.progress import Progress
from sdtrain.types import Batch


class LossSums:
    """Collects losses on the device, so that the host does not wait for them before a line is due.

    steps: this process's optimizer steps since the last line.
    """

    def __init__(self) -> None:
        self.steps: list[FinishedStep] = []
        self._sum: Tensor | float = 0.0
        self._count = 0
        self._micro_batches: list[MicroBatchLosses] = []
        self._earlier_levels: Tensor | float = 0.0  # of an earlier process, since its last line

    def add_micro_batch(self, batch: Batch, progress: Progress) -> None:
        self._sum = self._sum + progress.per_sample.sum()
        self._count = self._count + len(batch.caption)
        losses = MicroBatchLosses(batch.ordinal, progress.per_sample, progress.times)
        self._micro_batches.append(losses)

    def end_step(self, progress: Progress) -> None:
        step = progress.step
        self.steps.append(
            FinishedStep(progress.images_seen, step.loss, step.norm, self._micro_batches)
        )
        self._micro_batches = []

    def totals(self, trainer: L.Trainer, module: L.LightningModule) -> Tensor:
        """Return [2]: the sum and number of the losses over all ranks, which must all call it."""
        parts = []
        for value in (self._sum, self._count):
            parts.append(torch.as_tensor(value, device=module.device, dtype=torch.float32))
        return trainer.strategy.reduce(torch.stack(parts), reduce_op="sum")

    def by_level(self, trainer: L.Trainer, module: L.LightningModule) -> Tensor | None:
        """Return the same for each bin of log_snr, [2, bins]; None for an autoencoder."""
        if module.progress.times is None:
            return None
        losses = []
        times = []
        for step in self.steps:
            for micro_batch in step.micro_batches:
                losses.append(micro_batch.losses)
                times.append(micro_batch.times)
        schedule = module.model.objective.schedule
        own = self._earlier_levels + bin_losses(schedule, _concatenate(losses), _concatenate(times))
        return trainer.strategy.reduce(own.to(module.device), reduce_op="sum").cpu()

    def restore(self, totals: Tensor, levels: Tensor | None) -> None:
        """Continue from the `totals` and `levels` of a checkpoint; called on rank 0 only.

        They are sums over all ranks: [2], of losses and their number, and [2, bins] or None.
        """
        self._sum = totals[0]
        self._count = int(totals[1])
        self._earlier_levels = 0.0 if levels is None else levels


def _concatenate(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if parts else torch.zeros(0)
