"""Validation that means the same under every schedule: the error of epsilon by noise level, on held-out pictures."""

import hashlib
import json
import math
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import lightning.pytorch as L
import torch
from torch import Tensor

from sdtrain.evaluation.noise_level_error import (
    LEVELS,
    NoiseLevelErrors,
    linear_errors,
    network_errors,
)
from sdtrain.pictures import write_if_room
from sdtrain.plots import curves
from sdtrain.randomness import KeyedRandom
from sdtrain.runs.checkpoint import write_text
from sdtrain.training.callbacks.ema import EMACallback
from sdtrain.training.callbacks.intervals import due, ended, window_ended
from sdtrain.training.callbacks.metrics_log import MetricsLog
from sdtrain.training.loggers.wandb import log_picture

STATISTICS = 256  # training pictures behind the linear denoiser
FIRST = 4  # pictures by which the cost of one is measured


class NoiseLevelValidation(L.Callback):
    """Every `every` images seen and at the end: validation/bits_per_dim, see sdtrain.evaluation.noise_level_error, for EMA and raw weights.

    Each held-out picture has its own noise, the same at all levels, for all runs and at all times; it is used in an antithetic pair. In
    mid-run there are as many pictures as fit into `share` of the time, and all num_images at the end. Every picture's error at every level
    is kept in validation/IMAGES_SEEN.json, for comparisons picture by picture. Ranks share the pictures; nothing here draws from a generator.

    Args:
        every: images seen between looks, 0 for none, also at the end.
        num_images: held-out pictures.
        share: of the time of training that looks in mid-run may take, what comes before the first included; 1 takes all pictures each time.
    """

    def __init__(
        self,
        *,
        every: int,
        num_images: int,
        share: float,
        run_dir: Path,
        metrics_log: MetricsLog,
        ema: EMACallback | None,
    ) -> None:
        if every < 0 or num_images < 2:
            raise ValueError(
                f"callbacks.noise_levels.every={every} must be at least 0, and callbacks.noise_levels.num_images={num_images} at least 2."
            )
        if not 0 < share <= 1:
            raise ValueError(f"callbacks.noise_levels.share={share:g} must lie in (0, 1].")
        self.every, self.num_images, self.share = every, num_images, share
        self.folder, self.metrics_log, self.ema = run_dir / "validation", metrics_log, ema
        self.count: int | None = (
            num_images if share == 1 else None
        )  # pictures in mid-run, once their cost is known
        self.noise = KeyedRandom(0, "noise levels")
        self.latents: Tensor | None = None
        self.latest: dict[str, float] = {}

    @property
    def state_key(self) -> str:
        return "noise_levels"

    def state_dict(self) -> dict:
        return {"count": self.count, "every": self.every, "share": self.share}

    def load_state_dict(self, state: dict) -> None:
        if self.share < 1 and (state.get("every"), state.get("share")) == (self.every, self.share):
            self.count = state["count"]  # a resumed run looks at what it looked at before

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.began, self.began_at = time.monotonic(), trainer.datamodule.images_seen

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs, batch, batch_index: int
    ) -> None:
        last = ended(trainer, module)
        if self.every and window_ended(trainer) and (last or due(self.every, trainer)):
            self.look(trainer, module, last)

    def look(self, trainer: L.Trainer, module: L.LightningModule, last: bool) -> None:
        entered = time.monotonic()
        if self.latents is None:
            self._prepare(trainer, module)
        if self.count is None and not last:
            began = time.monotonic()
            self._errors(trainer, module, FIRST)
            taken, spent = time.monotonic() - began, time.monotonic() - entered
            images = module.optimisation.max_images - self.began_at
            whole = (
                images * (entered - self.began) / (trainer.datamodule.images_seen - self.began_at)
            )  # seconds of training, at this rate
            allowed = (self.share * whole - spent) / max(1, images // self.every)
            # A power of two, so that runs of about the same speed look at the same pictures.
            self.count = trainer.strategy.broadcast(
                max(2, 2 ** int(math.log2(max(1.0, allowed * FIRST / taken))))
            )
        count = min(len(self.latents), self.num_images if last else self.count)
        found = self._errors(trainer, module, count)
        if not trainer.is_global_zero:
            return
        numbers = {}
        for weights, errors in found.items():
            numbers |= {
                f"validation/{'' if weights == 'ema' or len(found) == 1 else 'raw_'}{name}": value
                for name, value in errors.summary().items()
            }
        self.latest = {
            key: value for key, value in numbers.items() if key.endswith("/bits_per_dim")
        }
        self._write(trainer, found)
        self.metrics_log.report(
            trainer,
            numbers
            | {
                "validation/pictures": count,
                "validation/seconds": round(time.monotonic() - entered, 3),
            },
        )

    def _prepare(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        data, autoencoder = trainer.datamodule, module.autoencoder
        self.size = min(
            256, 4 * data.micro_batch(trainer.world_size)
        )  # no gradient is kept: what trains in its memory fits
        # Ordinals as the loader's, so that a crop or flip, where there is one, is always the same.
        rows = [data.validation[(i, i)] for i in range(min(self.num_images, len(data.validation)))]
        known = [data.train[(i, i)].image for i in range(min(STATISTICS, len(data.train)))]
        encode = lambda images: torch.cat(  # noqa: E731
            [
                autoencoder.encode(torch.stack(part).to(module.device))
                for part in _split(images, min(64, self.size))
            ]
        )
        self.latents, latents = encode([row.image for row in rows]), encode(known)
        self.captions, self.labels = (
            [row.caption for row in rows],
            torch.tensor([row.label for row in rows], device=module.device),
        )
        self.mean, self.variance = (
            latents.mean((0, 2, 3), keepdim=True),
            latents.var((0, 2, 3), keepdim=True),
        )
        self.noises = torch.stack(
            [
                torch.from_numpy(self.noise.normal(i, tuple(self.latents.shape[1:])))
                for i in range(len(rows))
            ]
        ).to(module.device)
        schedule = module.objective.schedule
        self.inside = (LEVELS >= schedule.log_snr_min) & (LEVELS <= schedule.log_snr_max)
        self.linear = linear_errors(self.latents, self.mean, self.variance)
        self.pictures = [
            hashlib.sha256(
                ((row.image + 1) * 127.5).round().byte().numpy().tobytes() + row.caption.encode()
            ).hexdigest()[:12]
            for row in rows
        ]

    def _errors(
        self, trainer: L.Trainer, module: L.LightningModule, count: int
    ) -> dict[str, NoiseLevelErrors]:
        """Of the average, where there is one, and of the weights as they are. Each rank looks at every n-th picture."""

        def error(picture: Tensor, log_snr: Tensor, sign: Tensor) -> Tensor:
            noise = self.noises[picture] * sign.to(module.device).view(-1, 1, 1, 1)
            captions = [self.captions[i] for i in picture.tolist()]
            return module.epsilon_error(
                self.latents[picture],
                captions,
                self.labels[picture],
                noise,
                log_snr.to(module.device),
            )

        count, found = min(count, len(self.latents)), {}
        mine = torch.arange(count)[trainer.global_rank :: trainer.world_size]
        module.eval()
        for weights in ("ema", "raw") if self.ema else ("raw",):
            with self.ema.average.applied(module.trained()) if weights == "ema" else nullcontext():
                measured = torch.zeros(count, int(self.inside.sum()), dtype=torch.float64)
                measured[mine] = network_errors(error, mine, LEVELS[self.inside], self.size)
            errors = self.linear[:count].clone()
            errors[:, self.inside] = trainer.strategy.reduce(
                measured.to(module.device), reduce_op="sum"
            ).cpu()
            found[weights] = NoiseLevelErrors(errors, self.linear[:count], self.inside)
        module.train()
        return found

    def _write(self, trainer: L.Trainer, found: dict[str, NoiseLevelErrors]) -> None:
        first, seen = next(iter(found.values())), trainer.datamodule.images_seen
        autoencoder = trainer.lightning_module.autoencoder
        record = {
            "images_seen": seen,
            "log_snr": LEVELS.tolist(),
            "inside": self.inside.tolist(),
            "pictures": self.pictures[: len(first.errors)],
            "autoencoder": getattr(autoencoder, "sha256", None),
            "latent_scale": getattr(autoencoder, "latent_scale", None),
            "mean": self.mean.flatten().tolist(),
            "variance": self.variance.flatten().tolist(),
            "linear": first.linear.tolist(),
            "errors": {weights: errors.errors.tolist() for weights, errors in found.items()},
        }
        path = self.folder / f"{seen:012d}.json"
        try:
            path.parent.mkdir(exist_ok=True)
            write_text(path, json.dumps(record) + "\n")
        except OSError as error:
            print(
                f"sdtrain: {path} cannot be written: {error.strerror}. Training goes on without it.",
                file=sys.stderr,
                flush=True,
            )
        lines = {
            f"network, {weights} weights": errors.errors.mean(0)
            for weights, errors in found.items()
        }
        lines = {name: torch.where(self.inside, line, math.nan) for name, line in lines.items()} | {
            "linear denoiser": first.linear.mean(0)
        }
        picture = curves(
            LEVELS,
            lines,
            x_label="log_snr",
            y_label="mean squared error of epsilon",
            title=f"{seen} images seen, {len(first.errors)} pictures",
        )
        write_if_room(picture, path.with_suffix(".png"))
        for logger in trainer.loggers:
            log_picture(logger, "validation/noise_levels", picture, seen)


def _split(items: list, size: int) -> list[list]:
    return [items[i : i + size] for i in range(0, len(items), size)]
