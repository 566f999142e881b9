"""Draws an autoencoder's reconstructions during training, and at the end writes the folder that a
diffusion run reads.
"""

from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as L
import torch

from sdtrain import pictures
from sdtrain.models.autoencoder import write_autoencoder
from sdtrain.models.modes import eval_mode
from sdtrain.runs.layout import RunFolder
from sdtrain.signals import Interrupted, Signals, exit_code_of
from sdtrain.training.autoencoder_module import psnr
from sdtrain.training.callbacks.budget import Costs, affordable_count, held_out_count
from sdtrain.training.callbacks.ema import EMACallback, averaged_weights
from sdtrain.training.loggers.media import log_picture
from sdtrain.training.progress import Progress
from sdtrain.training.stopping import Stopping
from sdtrain.types import PictureData

CALIBRATION = 1024
"""Number of training pictures on which the latent scale is measured."""
ENCODE_BATCH = 64
RECONSTRUCT_BATCH = 8


@dataclass(frozen=True)
class PlannedReconstructions:
    """A grid of the first `count` held-out pictures."""

    cost: float
    left_out: list[str]
    count: int


class Reconstructions(L.Callback):
    """Draws a grid of held-out pictures over their reconstructions every `every` images seen and at
    the end. At the end also writes RUN/autoencoder with the weights (EMA if there is one), the
    measured latent scale, and measured.json.
    """

    weight = 1
    on_all_ranks = False

    def __init__(
        self,
        *,
        every: int,
        num_images: int,
        run_dir: Path,
        ema: EMACallback | None,
        signals: Signals,
        data: PictureData | None,
    ) -> None:
        self.every = every
        self.num_images = held_out_count(num_images, data)
        self.run = RunFolder(run_dir)
        self.ema = ema
        self.signals = signals
        self.last_grid: Path | None = None

    def is_due(self, progress: Progress) -> bool:
        return progress.ended or progress.is_due(self.every)

    def plan(
        self, module: L.LightningModule, costs: Costs, allowed: float, *, first: bool, last: bool
    ) -> PlannedReconstructions:
        count = affordable_count(allowed - costs.page, 1.0, self.num_images)
        left_out = [f"{count} of {self.num_images} pictures"] if count < self.num_images else []
        return PlannedReconstructions(count + costs.page if count else 0.0, left_out, count)

    def look(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        planned: PlannedReconstructions,
        stopping: Stopping,
    ) -> dict[str, float]:
        with eval_mode(module), averaged_weights(self.ema, module), torch.no_grad():
            self.draw(trainer, module, planned.count, stopping)
        return {}

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Export the autoencoder, after the last checkpoint: if a signal or a full disk stops the
        run here, resuming from that checkpoint makes the export without further training.
        """
        if trainer.is_global_zero and module.progress.ended:
            with eval_mode(module), averaged_weights(self.ema, module), torch.no_grad():
                self.export(trainer, module)

    def draw(
        self, trainer: L.Trainer, module: L.LightningModule, count: int, stopping: Stopping
    ) -> None:
        """Draw the grid of the first `count` held-out pictures."""
        seen = module.progress.images_seen
        held_out = trainer.datamodule.validation
        rows = [held_out[(i, i)] for i in range(min(count, len(held_out)))]
        image = torch.stack([row.image for row in rows]).to(module.device)
        parts = []
        for part in image.split(RECONSTRUCT_BATCH):
            stopping.check_interrupted()
            parts.append(module.reconstruct(part))
        output = torch.cat(parts)
        captions = []
        for row, value in zip(rows, psnr(output, image).tolist(), strict=True):
            captions.append(f"{row.caption} ({value:.1f} dB)")
        # Each picture above its reconstruction, as one tall tile.
        tiles = torch.cat([image, output], dim=2)
        title = f"{seen} images seen: held-out pictures over their reconstructions"
        picture = pictures.grid(tiles, captions, columns=8, title=title)
        self.last_grid = pictures.write_png_or_warn(picture, self.run.sample("grid", seen))
        for logger in trainer.loggers:
            log_picture(logger, "samples/grid", picture, seen)

    def _check_interrupted(self) -> None:
        """Raise Interrupted after a signal: the export is made when the run is resumed."""
        if self.signals.received:
            raise Interrupted(exit_code_of(self.signals.received))

    def export(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Write the autoencoder's folder, with the latent scale (1 / standard deviation of the
        latents of training pictures) and the PSNR of all held-out pictures.
        """
        data = trainer.datamodule
        count = min(CALIBRATION, len(data.train))
        images = torch.stack([data.train[(i, i)].image for i in range(count)])
        latents = []
        for image in images.split(ENCODE_BATCH):
            self._check_interrupted()
            latents.append(module.net.encode(image.to(module.device)).latent_dist.mean)
        latent_scale = 1 / torch.cat(latents).std().item()
        batches = []
        for batch in data.validation_batches(len(data.validation)):
            self._check_interrupted()
            batches.append(module.validate(batch.to(module.device))["psnr"])
        psnr_values = torch.cat(batches)
        measured = {
            "psnr": psnr_values.mean().item(),
            "held_out_pictures": len(psnr_values),
            "latent_scale": latent_scale,
        }
        write_autoencoder(module.net, latent_scale, self.run.autoencoder, measured)
