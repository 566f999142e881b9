"""Looks at held-out pictures while training."""

from contextlib import nullcontext

import lightning.pytorch as L
import torch

from sdtrain.training.callbacks.ema import EMACallback
from sdtrain.training.callbacks.intervals import due, ended, window_ended
from sdtrain.training.callbacks.metrics_log import MetricsLog


class Validation(L.Callback):
    """The module's own per-sample numbers on the first `num_images` held-out pictures, every `every` images seen and at the end.

    Their noise and times are keyed by picture, so the numbers of one run can be compared over time. EMA weights where there are some.
    Rank 0 looks alone: the others wait at the next optimizer step.
    """

    def __init__(
        self, *, every: int, num_images: int, metrics_log: MetricsLog, ema: EMACallback | None
    ) -> None:
        if every < 0 or num_images < 1:
            raise ValueError(
                f"validation.every={every} must be at least 0, and validation.num_images={num_images} at least 1."
            )
        self.every, self.num_images, self.metrics_log, self.ema = (
            every,
            num_images,
            metrics_log,
            ema,
        )
        self.latest: dict[str, float] = {}

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs, batch, batch_index: int
    ) -> None:
        last = ended(trainer, module)
        if (
            window_ended(trainer)
            and trainer.is_global_zero
            and (due(self.every, trainer) or (last and self.every))
        ):
            self.look(trainer, module)

    def look(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        numbers: dict[str, list[torch.Tensor]] = {}
        module.eval()
        with self.ema.average.applied(module.trained()) if self.ema else nullcontext():
            for batch in trainer.datamodule.validation_batches(self.num_images):
                for name, values in module.validate(batch.to(module.device)).items():
                    numbers.setdefault(name, []).append(values)
        module.train()
        self.latest = {
            f"validation/{name}": torch.cat(values).mean().item()
            for name, values in numbers.items()
        }
        self.metrics_log.report(trainer, self.latest)
