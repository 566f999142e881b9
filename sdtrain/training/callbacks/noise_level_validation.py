"""Validation that is comparable between schedules: the squared error of epsilon by noise level, on
held-out pictures.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as L
import torch
from torch import Tensor

from sdtrain.conditioning.interface import Inputs, MaskedPictures
from sdtrain.config.schema import check_at_least
from sdtrain.console import warn
from sdtrain.data.crop import pixels_sha256
from sdtrain.data.masks import random_mask
from sdtrain.evaluation.noise_level_error import (
    LEVELS,
    NoiseLevelErrors,
    linear_errors,
    network_errors,
)
from sdtrain.files import write_text
from sdtrain.latent_diffusion import LatentDiffusion
from sdtrain.models.modes import eval_mode
from sdtrain.pictures import write_png_or_warn
from sdtrain.plots import LOG_SNR, draw_curves
from sdtrain.randomness import KeyedRandom
from sdtrain.runs.layout import RunFolder
from sdtrain.schedules import Schedule
from sdtrain.training.callbacks.budget import Costs, affordable_count, held_out_count
from sdtrain.training.callbacks.ema import EMACallback, averaged_weights
from sdtrain.training.loggers.media import log_picture
from sdtrain.training.progress import Progress
from sdtrain.training.stopping import Stopping
from sdtrain.types import PictureData, Pictures, Row, rows_by_size

STATISTICS = 256
"""Number of training pictures that the linear denoiser is estimated from."""
MAX_BATCH = 32
"""Largest batch size: a signal is handled between two batches."""


@dataclass(frozen=True)
class PlannedLevels:
    """A validation on the first `count` held-out pictures with these weights ("ema", "raw"), the
    average first.
    """

    cost: float
    left_out: list[str]
    count: int
    weights: tuple[str, ...]


@dataclass
class HeldOut:
    """The held-out pictures, encoded once, and the errors of the linear denoiser to compare with.

    x0, noise [N, C, h, w]; labels [N]; depth [N, 1, H, W] or None; masked: pictures and masks of a
    model that inpaints, or None; mean, variance [1, C, 1, 1] of
    training latents; inside [L] bool: the noise levels that the schedule reaches; linear [N, L]:
    errors of the linear denoiser; names: content hashes of the pictures.
    """

    x0: Tensor
    noise: Tensor
    captions: list[str]
    labels: Tensor
    depth: Tensor | None
    masked: MaskedPictures | None
    mean: Tensor
    variance: Tensor
    inside: Tensor
    linear: Tensor
    names: list[str]

    def inputs(self, picture: Tensor) -> Inputs:
        """Return the conditions, none dropped, of the pictures with these indices [B] int64."""
        return Inputs(
            [self.captions[i] for i in picture.tolist()],
            self.labels[picture],
            torch.zeros(len(picture), dtype=torch.bool, device=self.x0.device),
            latent_size=tuple(self.x0.shape[-2:]),
            depth=None if self.depth is None else self.depth[picture],
            masked=None if self.masked is None else self.masked[picture],
        )


class NoiseLevelValidation(L.Callback):
    """Logs validation/bits_per_dim, see sdtrain.evaluation.noise_level_error, with EMA and raw
    weights, every `every` images seen and at the end.

    Each held-out picture has its own noise, the same at all levels, in all runs and at all times,
    which is used in an antithetic pair. If the budget of looks does not allow all pictures, the raw
    weights are left out (if there is an average), and then the number of pictures is reduced to a
    power of two, so that the arms of a sweep validate on the same ones. The error of every picture
    at every level is written to validation/IMAGES_SEEN.json, for comparisons picture by picture.
    Ranks share the pictures; nothing here draws from a global generator.

    Args:
        every: images seen between validations; 0 never validates, not even at the end.
        num_images: number of held-out pictures.
    """

    weight = 5
    on_all_ranks = True

    def __init__(
        self,
        *,
        every: int,
        num_images: int,
        run_dir: Path,
        ema: EMACallback | None,
        data: PictureData | None,
    ) -> None:
        check_at_least(every, 0, "callbacks.noise_levels.every")
        check_at_least(num_images, 2, "callbacks.noise_levels.num_images")
        self.every = every
        self.num_images = held_out_count(num_images, data)
        self.run = RunFolder(run_dir)
        self.ema = ema
        self.random = KeyedRandom(0, "noise levels")
        self.held_out: HeldOut | None = None
        self.latest: dict[str, float] = {}

    def is_due(self, progress: Progress) -> bool:
        return self.every > 0 and (progress.ended or progress.is_due(self.every))

    def plan(
        self, module: L.LightningModule, costs: Costs, allowed: float, *, first: bool, last: bool
    ) -> PlannedLevels:
        num_levels = int(levels_inside(module.model.objective.schedule).sum())
        # All ranks encode all pictures, and the training pictures of the linear denoiser once.
        statistics = STATISTICS * costs.encode if first else 0
        overhead = costs.ranks * (costs.page + statistics)
        encode = costs.ranks * costs.encode
        weights = ("ema", "raw") if self.ema else ("raw",)
        cost_each = encode + 2 * num_levels * len(weights)
        left_out = []
        count = affordable_count(allowed - overhead, cost_each, self.num_images)
        if count < self.num_images and self.ema:
            left_out.append("raw weights")
            weights = ("ema",)
            cost_each = encode + 2 * num_levels
            count = affordable_count(allowed - overhead, cost_each, self.num_images)
        if count < self.num_images:
            # A single picture would have no standard error.
            count = 2 ** int(math.log2(count)) if count > 1 else 0
            left_out.insert(0, f"{count} of {self.num_images} pictures")
        cost = overhead + count * cost_each if count else 0.0
        return PlannedLevels(cost, left_out, count, weights)

    def look(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        planned: PlannedLevels,
        stopping: Stopping,
    ) -> dict[str, float]:
        if self.held_out is None or len(self.held_out.x0) < planned.count:
            self._prepare(trainer, module.model, planned.count, stopping)
        by_weights = self._errors(trainer, module, planned, stopping)
        if not trainer.is_global_zero:
            return {}
        metrics = {}
        for weights, errors in by_weights.items():
            prefix = "validation/" if weights == planned.weights[0] else "validation/raw_"
            for name, value in errors.summary().items():
                metrics[f"{prefix}{name}"] = value
        self.latest = {}
        for name, value in metrics.items():
            if name.endswith(("/bits_per_dim", "/bits_saved")):
                self.latest[name] = value
        self._write(trainer, module, by_weights)
        metrics["validation/pictures"] = len(next(iter(by_weights.values())).errors)
        return metrics

    def _prepare(
        self, trainer: L.Trainer, model: LatentDiffusion, count: int, stopping: Stopping
    ) -> None:
        """Encode `count` held-out pictures, and compute the errors of the linear denoiser."""
        data = trainer.datamodule
        # No gradients are kept, so a batch of four micro-batches fits into the memory of training.
        self.batch_size = min(MAX_BATCH, 4 * data.micro_batch(trainer.world_size))

        def encode(pictures: Pictures, count: int) -> tuple[list[Row], list[Tensor]]:
            rows = []
            parts = []
            for indices in torch.arange(min(count, len(pictures))).split(self.batch_size):
                stopping.check_interrupted()
                # The ordinal, which keys a crop or flip, is the index: they are always the same.
                part = [pictures[(i, i)] for i in indices.tolist()]
                rows += part
                parts += [model.latents_of_rows(same_size) for same_size in rows_by_size(part)]
            return rows, parts

        rows, held_out = encode(data.validation, count)
        x0 = torch.cat(held_out)
        _, trained = encode(data.train, STATISTICS)
        of_channels = torch.cat([part.transpose(0, 1).flatten(1) for part in trained], dim=1)
        mean = of_channels.mean(1).view(1, -1, 1, 1)
        variance = of_channels.var(1).view(1, -1, 1, 1)
        noise = [torch.from_numpy(self.random.normal(i, x0.shape[1:])) for i in range(len(rows))]
        depth = None
        if rows[0].depth is not None:
            depth = torch.stack([row.depth for row in rows]).to(x0.device)
        self.held_out = HeldOut(
            x0=x0,
            noise=torch.stack(noise).to(x0.device),
            captions=[row.caption for row in rows],
            labels=torch.tensor([row.label for row in rows], device=x0.device),
            depth=depth,
            masked=held_out_masked(model, rows) if "mask" in model.reads else None,
            mean=mean,
            variance=variance,
            inside=levels_inside(model.objective.schedule),
            linear=linear_errors(x0, mean, variance),
            names=[content_hash(row) for row in rows],
        )

    def _errors(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        planned: PlannedLevels,
        stopping: Stopping,
    ) -> dict[str, NoiseLevelErrors]:
        """Return {weights: errors} for the planned weights, "ema" and "raw".

        Each of n ranks measures every n-th picture.
        """
        held_out = self.held_out
        device = module.device

        def error(picture: Tensor, log_snr: Tensor, sign: Tensor) -> Tensor:
            noise = held_out.noise[picture] * sign.to(device).view(-1, 1, 1, 1)
            inputs = held_out.inputs(picture)
            x0 = held_out.x0[picture]
            return module.model.epsilon_error(x0, inputs, noise, log_snr.to(device))

        count = min(planned.count, len(held_out.x0))
        own_pictures = torch.arange(count)[trainer.global_rank :: trainer.world_size]
        inside = held_out.inside
        by_weights = {}
        for weights in planned.weights:
            ema = self.ema if weights == "ema" else None
            measured = torch.zeros(count, int(inside.sum()), dtype=torch.float64)
            with eval_mode(module), averaged_weights(ema, module):
                measured[own_pictures] = network_errors(
                    error,
                    own_pictures,
                    LEVELS[inside],
                    self.batch_size,
                    on_evaluation=stopping.check_interrupted,
                )
            stopping.wait_for_ranks()
            errors = held_out.linear[:count].clone()
            summed = trainer.strategy.reduce(measured.to(device), reduce_op="sum")
            errors[:, inside] = summed.cpu()
            by_weights[weights] = NoiseLevelErrors(errors, held_out.linear[:count], inside)
        return by_weights

    def _write(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        by_weights: dict[str, NoiseLevelErrors],
    ) -> None:
        """Write the errors of every picture to a JSON file, and plot their means."""
        held_out = self.held_out
        seen = module.progress.images_seen
        first = next(iter(by_weights.values()))
        count = len(first.errors)
        record = {
            "images_seen": seen,
            "log_snr": LEVELS.tolist(),
            "inside": held_out.inside.tolist(),
            "pictures": held_out.names[:count],
            "autoencoder": module.model.frozen_hashes().get("autoencoder"),
            "latent_scale": getattr(module.model.autoencoder, "latent_scale", None),
            "mean": held_out.mean.flatten().tolist(),
            "variance": held_out.variance.flatten().tolist(),
            "linear": first.linear.tolist(),
            "errors": {weights: each.errors.tolist() for weights, each in by_weights.items()},
        }
        path = self.run.validation_record(seen)
        try:
            path.parent.mkdir(exist_ok=True)
            write_text(path, json.dumps(record) + "\n")
        except OSError as error:
            warn(f"{path} cannot be written: {error.strerror}. Training continues without it.")
        lines = {}
        for weights, each in by_weights.items():
            mean = each.errors.mean(0)
            lines[f"network, {weights} weights"] = torch.where(held_out.inside, mean, math.nan)
        lines["linear denoiser"] = first.linear.mean(0)
        picture = draw_curves(
            LEVELS,
            lines,
            x_label=LOG_SNR,
            y_label="mean squared error of epsilon",
            title=f"{seen} images seen, {count} pictures",
        )
        write_png_or_warn(picture, self.run.validation_plot(seen))
        for logger in trainer.loggers:
            log_picture(logger, "validation/noise_levels", picture, seen)


def levels_inside(schedule: Schedule) -> Tensor:
    """Return which noise levels the schedule reaches, [L] bool."""
    return (LEVELS >= schedule.log_snr_min) & (LEVELS <= schedule.log_snr_max)


def content_hash(row: Row) -> str:
    """Return twelve hexadecimal digits that identify a held-out picture in any run."""
    if row.image is not None:
        pixels = pixels_sha256(row.image)
    else:
        pixels = row.pixels_sha256 or row.moments.numpy().tobytes()
    return hashlib.sha256(pixels + row.caption.encode()).hexdigest()[:12]


def held_out_masked(model: LatentDiffusion, rows: Sequence[Row]) -> MaskedPictures:
    """Return held-out pictures with a mask each, which is keyed by its place."""
    random = KeyedRandom(0, "validation.mask")
    masks = []
    for place, row in enumerate(rows):
        masks.append(torch.from_numpy(random_mask(random.at(place), *row.image.shape[1:])))
    images = torch.stack([row.image for row in rows]).to(model.device)
    return model.masked_pictures(images, torch.stack(masks)[:, None].float().to(model.device))
