"""The training loss, or an autoencoder's psnr, on held-out pictures."""

from dataclasses import dataclass

import lightning.pytorch as L
import torch

from sdtrain.config.schema import at_least
from sdtrain.models.modes import eval_mode
from sdtrain.training.callbacks.budget import Costs, fitting
from sdtrain.training.callbacks.ema import EMACallback, averaged_weights
from sdtrain.training.progress import Progress
from sdtrain.training.stopping import Stopping

AT_ONCE = 16
"""Pictures of a batch: a signal waits no longer than for one."""


@dataclass(frozen=True)
class PlannedValidation:
    """Of the first `count` held-out pictures."""

    cost: float
    left_out: list[str]
    count: int


class Validation(L.Callback):
    """The module's own per-sample numbers on the first `num_images` held-out pictures, every
    `every` images seen and at the end; every = 0 is never.

    Their noise and times are keyed by picture, so the numbers of one run can be compared over time.
    EMA weights where there are some. Rank 0 validates alone.
    """

    weight = 1
    on_all_ranks = False

    def __init__(self, *, every: int, num_images: int, ema: EMACallback | None) -> None:
        at_least(every, 0, "validation.every")
        at_least(num_images, 1, "validation.num_images")
        self.every = every
        self.num_images = num_images
        self.ema = ema
        self.latest: dict[str, float] = {}

    def is_due(self, progress: Progress) -> bool:
        return self.every > 0 and (progress.ended or progress.is_due(self.every))

    def plan(
        self, module: L.LightningModule, costs: Costs, allowed: float, *, first: bool, last: bool
    ) -> PlannedValidation:
        one = 1 + costs.encode
        count = fitting(allowed, one, self.num_images)
        left_out = [f"{count} of {self.num_images} pictures"] if count < self.num_images else []
        return PlannedValidation(count * one, left_out, count)

    def look(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        planned: PlannedValidation,
        stopping: Stopping,
    ) -> dict[str, float]:
        numbers: dict[str, list[torch.Tensor]] = {}
        with eval_mode(module), averaged_weights(self.ema, module):
            for batch in trainer.datamodule.validation_batches(planned.count, AT_ONCE):
                stopping.go_on()
                for name, values in module.validate(batch.to(module.device)).items():
                    numbers.setdefault(name, []).append(values)
        self.latest = {}
        for name, values in numbers.items():
            self.latest[f"validation/{name}"] = torch.cat(values).mean().item()
        return self.latest
