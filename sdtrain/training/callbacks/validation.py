"""Validates on held-out pictures: the training loss, or an autoencoder's PSNR."""

from dataclasses import dataclass

import lightning.pytorch as L
import torch

from sdtrain.config.schema import check_at_least
from sdtrain.models.modes import eval_mode
from sdtrain.training.callbacks.budget import Costs, affordable_count, held_out_count
from sdtrain.training.callbacks.ema import EMACallback, averaged_weights
from sdtrain.training.progress import Progress
from sdtrain.training.stopping import Stopping
from sdtrain.types import PictureData

BATCH_SIZE = 16
"""Pictures per batch: few, because a signal is handled between two batches."""


@dataclass(frozen=True)
class PlannedValidation:
    """A validation on the first `count` held-out pictures."""

    cost: float
    left_out: list[str]
    count: int


class Validation(L.Callback):
    """Logs the mean of module.validate over the first `num_images` held-out pictures, every `every`
    images seen and at the end; never for every = 0.

    Noise and times are keyed by picture, so the metrics of one run can be compared over time. Uses
    the EMA weights if there are any. Runs on rank 0 only.
    """

    weight = 1
    on_all_ranks = False

    def __init__(
        self, *, every: int, num_images: int, ema: EMACallback | None, data: PictureData | None
    ) -> None:
        check_at_least(every, 0, "validation.every")
        check_at_least(num_images, 1, "validation.num_images")
        self.every = every
        self.num_images = held_out_count(num_images, data)
        self.ema = ema
        self.latest: dict[str, float] = {}

    def is_due(self, progress: Progress) -> bool:
        return self.every > 0 and (progress.ended or progress.is_due(self.every))

    def plan(
        self, module: L.LightningModule, costs: Costs, allowed: float, *, first: bool, last: bool
    ) -> PlannedValidation:
        cost_each = 1 + costs.encode
        count = affordable_count(allowed, cost_each, self.num_images)
        left_out = [f"{count} of {self.num_images} pictures"] if count < self.num_images else []
        return PlannedValidation(count * cost_each, left_out, count)

    def look(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        planned: PlannedValidation,
        stopping: Stopping,
    ) -> dict[str, float]:
        batches_of: dict[str, list[torch.Tensor]] = {}
        with eval_mode(module), averaged_weights(self.ema, module):
            for batch in trainer.datamodule.validation_batches(planned.count, BATCH_SIZE):
                stopping.check_interrupted()
                for name, values in module.validate(batch.to(module.device)).items():
                    batches_of.setdefault(name, []).append(values)
        self.latest = {}
        for name, batches in batches_of.items():
            self.latest[f"validation/{name}"] = torch.cat(batches).mean().item()
        return self.latest
