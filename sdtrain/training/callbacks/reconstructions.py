"""What an autoencoder run leaves behind: pictures beside their reconstructions, and at the end the
folder that a diffusion run reads.
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
from sdtrain.training.callbacks.budget import Costs, fitting
from sdtrain.training.callbacks.ema import EMACallback, averaged_weights
from sdtrain.training.loggers.media import log_picture
from sdtrain.training.progress import Progress
from sdtrain.training.stopping import Stopping

CALIBRATION = 1024
"""Training pictures that the latent scale is measured on."""
ENCODED_AT_ONCE = 64
DRAWN_AT_ONCE = 8


@dataclass(frozen=True)
class PlannedReconstructions:
    """Of the first `count` held-out pictures."""

    cost: float
    left_out: list[str]
    count: int


class Reconstructions(L.Callback):
    """Every `every` images seen and at the end: a grid of held-out pictures over their
    reconstructions. At the end RUN/autoencoder with the weights (EMA where there is one), the
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
    ) -> None:
        self.every = every
        self.num_images = num_images
        self.run = RunFolder(run_dir)
        self.ema = ema
        self.signals = signals
        self.last_grid: Path | None = None

    def is_due(self, progress: Progress) -> bool:
        return progress.ended or progress.is_due(self.every)

    def plan(
        self, module: L.LightningModule, costs: Costs, allowed: float, *, first: bool, last: bool
    ) -> PlannedReconstructions:
        count = fitting(allowed - costs.page, 1.0, self.num_images)
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
        """After the last checkpoint, from which a run that is stopped here, or whose disk is full,
        goes on with nothing left to train.
        """
        if trainer.is_global_zero and module.progress.ended:
            with eval_mode(module), averaged_weights(self.ema, module), torch.no_grad():
                self.export(trainer, module)

    def draw(
        self, trainer: L.Trainer, module: L.LightningModule, count: int, stopping: Stopping
    ) -> None:
        seen = module.progress.images_seen
        held_out = trainer.datamodule.validation
        rows = [held_out[(i, i)] for i in range(min(count, len(held_out)))]
        image = torch.stack([row.image for row in rows]).to(module.device)
        parts = []
        for part in image.split(DRAWN_AT_ONCE):
            stopping.go_on()
            parts.append(module.reconstruct(part))
        output = torch.cat(parts)
        captions = []
        for row, value in zip(rows, psnr(output, image).tolist(), strict=True):
            captions.append(f"{row.caption} ({value:.1f} dB)")
        # Each picture above its reconstruction, as one tall tile.
        tiles = torch.cat([image, output], dim=2)
        title = f"{seen} images seen: held-out pictures over their reconstructions"
        picture = pictures.grid(tiles, captions, columns=8, title=title)
        self.last_grid = pictures.write_if_room(picture, self.run.sample("grid", seen))
        for logger in trainer.loggers:
            log_picture(logger, "samples/grid", picture, seen)

    def _go_on(self) -> None:
        """Raises Interrupted after a signal: the export is made when the run goes on."""
        if self.signals.received:
            raise Interrupted(exit_code_of(self.signals.received))

    def export(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        data = trainer.datamodule
        images = torch.stack(
            [data.train[(i, i)].image for i in range(min(CALIBRATION, len(data.train)))]
        )
        latents = []
        for image in images.split(ENCODED_AT_ONCE):
            self._go_on()
            latents.append(module.net.encode(image.to(module.device)).latent_dist.mean)
        latent_scale = 1 / torch.cat(latents).std().item()
        quality = []
        for batch in data.validation_batches(len(data.validation)):
            self._go_on()
            quality.append(module.validate(batch.to(module.device))["psnr"])
        quality = torch.cat(quality)
        measured = {
            "psnr": quality.mean().item(),
            "held_out_pictures": len(quality),
            "latent_scale": latent_scale,
        }
        write_autoencoder(module.net, latent_scale, self.run.autoencoder, measured)
