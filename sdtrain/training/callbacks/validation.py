"""The training loss, or an autoencoder's psnr, on held-out pictures."""

import lightning.pytorch as L
import torch

from sdtrain.config.schema import at_least
from sdtrain.models.modes import eval_mode
from sdtrain.training.callbacks.ema import EMACallback, averaged_weights
from sdtrain.training.callbacks.metrics_log import MetricsLog
from sdtrain.training.progress import window_ended


class Validation(L.Callback):
    """The module's own per-sample numbers on the first `num_images` held-out pictures, every
    `every` images seen and at the end; every = 0 is never.

    Their noise and times are keyed by picture, so the numbers of one run can be compared over time.
    EMA weights where there are some. Rank 0 validates alone: the others wait at the next optimizer
    step.
    """

    def __init__(
        self, *, every: int, num_images: int, metrics_log: MetricsLog, ema: EMACallback | None
    ) -> None:
        at_least(every, 0, "validation.every")
        at_least(num_images, 1, "validation.num_images")
        self.every = every
        self.num_images = num_images
        self.metrics_log = metrics_log
        self.ema = ema
        self.latest: dict[str, float] = {}

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs, batch, batch_index: int
    ) -> None:
        if not self.every or not window_ended(trainer) or not trainer.is_global_zero:
            return
        if module.progress.ended or module.progress.is_due(self.every):
            self.validate(trainer, module)

    def validate(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        numbers: dict[str, list[torch.Tensor]] = {}
        with eval_mode(module), averaged_weights(self.ema, module):
            for batch in trainer.datamodule.validation_batches(self.num_images):
                for name, values in module.validate(batch.to(module.device)).items():
                    numbers.setdefault(name, []).append(values)
        self.latest = {}
        for name, values in numbers.items():
            self.latest[f"validation/{name}"] = torch.cat(values).mean().item()
        self.metrics_log.report(trainer, module.progress, self.latest)
