"""What an autoencoder run leaves behind: pictures beside their reconstructions, and at the end the
folder that a diffusion run reads.
"""

from pathlib import Path

import lightning.pytorch as L
import torch

from sdtrain import pictures
from sdtrain.models.autoencoder import write_autoencoder
from sdtrain.models.modes import eval_mode
from sdtrain.runs.layout import RunFolder
from sdtrain.training.autoencoder_module import psnr
from sdtrain.training.callbacks.ema import EMACallback, averaged_weights
from sdtrain.training.loggers.media import log_picture
from sdtrain.training.progress import window_ended

CALIBRATION = 1024
"""Training pictures that the latent scale is measured on."""
ENCODED_AT_ONCE = 128


class Reconstructions(L.Callback):
    """Every `every` images seen and at the end: a grid of held-out pictures over their
    reconstructions. At the end RUN/autoencoder with the weights (EMA where there is one), the
    measured latent scale, and measured.json.
    """

    def __init__(
        self, *, every: int, num_images: int, run_dir: Path, ema: EMACallback | None
    ) -> None:
        self.every = every
        self.num_images = num_images
        self.run = RunFolder(run_dir)
        self.ema = ema
        self.last_grid: Path | None = None

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs, batch, batch_index: int
    ) -> None:
        if not window_ended(trainer) or not trainer.is_global_zero:
            return
        if module.progress.ended or module.progress.is_due(self.every):
            with eval_mode(module), averaged_weights(self.ema, module), torch.no_grad():
                self.draw(trainer, module)

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """After the last checkpoint, from which a run whose disk is full here goes on, with nothing
        left to train.
        """
        if trainer.is_global_zero and module.progress.ended:
            with eval_mode(module), averaged_weights(self.ema, module), torch.no_grad():
                self.export(trainer, module)

    def draw(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        seen = module.progress.images_seen
        held_out = trainer.datamodule.validation
        rows = [held_out[(i, i)] for i in range(min(self.num_images, len(held_out)))]
        image = torch.stack([row.image for row in rows]).to(module.device)
        output = module.reconstruct(image)
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

    def export(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        data = trainer.datamodule
        images = torch.stack(
            [data.train[(i, i)].image for i in range(min(CALIBRATION, len(data.train)))]
        )
        latents = []
        for image in images.split(ENCODED_AT_ONCE):
            latents.append(module.net.encode(image.to(module.device)).latent_dist.mean)
        latent_scale = 1 / torch.cat(latents).std().item()
        quality = []
        for batch in data.validation_batches(len(data.validation)):
            quality.append(module.validate(batch.to(module.device))["psnr"])
        quality = torch.cat(quality)
        measured = {
            "psnr": quality.mean().item(),
            "held_out_pictures": len(quality),
            "latent_scale": latent_scale,
        }
        write_autoencoder(module.net, latent_scale, self.run.autoencoder, measured)
