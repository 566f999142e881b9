"""What an autoencoder run leaves behind: pictures beside their reconstructions, and at the end the folder that a diffusion run reads."""

from contextlib import nullcontext
from pathlib import Path

import lightning.pytorch as L
import torch

from sdtrain import pictures
from sdtrain.models.autoencoder import write_autoencoder
from sdtrain.training.autoencoder_module import psnr
from sdtrain.training.callbacks.ema import EMACallback
from sdtrain.training.callbacks.intervals import due, ended, window_ended
from sdtrain.training.loggers.wandb import log_picture

CALIBRATION = 1024  # training pictures that the latent scale is measured on


class Reconstructions(L.Callback):
    """Every `every` images seen and at the end: a grid of held-out pictures over their reconstructions. At the end RUN/autoencoder with the
    weights (EMA where there is one), the measured latent scale, and measured.json.
    """

    def __init__(
        self, *, every: int, num_images: int, run_dir: Path, ema: EMACallback | None
    ) -> None:
        self.every, self.num_images, self.run_dir, self.ema = every, num_images, run_dir, ema
        self.last_grid: Path | None = None

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs, batch, batch_index: int
    ) -> None:
        last = ended(trainer, module)
        if (
            not window_ended(trainer)
            or not trainer.is_global_zero
            or not (due(self.every, trainer) or last)
        ):
            return
        with (
            self.ema.average.applied(module.trained()) if self.ema else nullcontext(),
            torch.no_grad(),
        ):
            self.draw(trainer, module)

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """After the last checkpoint, from which a run whose disk is full here goes on, with nothing left to train."""
        if trainer.is_global_zero and ended(trainer, module):
            with (
                self.ema.average.applied(module.trained()) if self.ema else nullcontext(),
                torch.no_grad(),
            ):
                self.export(trainer, module)

    def draw(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        seen, held_out = trainer.datamodule.images_seen, trainer.datamodule.validation
        rows = [held_out[(i, i)] for i in range(min(self.num_images, len(held_out)))]
        image = torch.stack([row.image for row in rows]).to(module.device)
        output = module.net.decode(module.net.encode(image).latent_dist.mean).sample
        captions = [
            f"{row.caption} ({value:.1f} dB)"
            for row, value in zip(rows, psnr(output, image).tolist(), strict=True)
        ]
        # Each picture above its reconstruction, as one tall tile.
        title = f"{seen} images seen: held-out pictures over their reconstructions"
        picture = pictures.grid(torch.cat([image, output], dim=2), captions, columns=8, title=title)
        self.last_grid = pictures.write_if_room(
            picture, self.run_dir / "samples" / f"grid-{seen:09d}.png"
        )
        for logger in trainer.loggers:
            log_picture(logger, "samples/grid", picture, seen)

    def export(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        train = trainer.datamodule.train
        images = torch.stack(
            [train[(i, i)].image for i in range(min(CALIBRATION, len(train)))]
        ).split(128)
        latents = torch.cat(
            [module.net.encode(image.to(module.device)).latent_dist.mean for image in images]
        )
        latent_scale = 1 / latents.std().item()
        quality = [
            module.validate(batch.to(module.device))["psnr"]
            for batch in trainer.datamodule.validation_batches(len(trainer.datamodule.validation))
        ]
        measured = {
            "psnr": torch.cat(quality).mean().item(),
            "held_out_pictures": len(torch.cat(quality)),
            "latent_scale": latent_scale,
        }
        write_autoencoder(module.net, latent_scale, self.run_dir / "autoencoder", measured)
