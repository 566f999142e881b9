"""Validation that means the same under every schedule: the error of epsilon by noise level, on
held-out pictures.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as L
import torch
from torch import Tensor

from sdtrain.conditioning.interface import Inputs
from sdtrain.config.schema import at_least
from sdtrain.console import warn
from sdtrain.evaluation.noise_level_error import (
    LEVELS,
    NoiseLevelErrors,
    linear_errors,
    network_errors,
)
from sdtrain.files import write_text
from sdtrain.latent_diffusion import LatentDiffusion
from sdtrain.models.modes import eval_mode
from sdtrain.pictures import write_if_room
from sdtrain.plots import LOG_SNR, curves
from sdtrain.randomness import KeyedRandom
from sdtrain.runs.layout import RunFolder
from sdtrain.schedules import Schedule
from sdtrain.training.callbacks.budget import Costs, fitting
from sdtrain.training.callbacks.ema import EMACallback, averaged_weights
from sdtrain.training.loggers.media import log_picture
from sdtrain.training.progress import Progress
from sdtrain.training.stopping import Stopping
from sdtrain.types import Pictures, Row

STATISTICS = 256
"""Training pictures behind the linear denoiser."""
AT_ONCE = 32
"""Largest batch: a signal waits no longer than for one."""


@dataclass(frozen=True)
class PlannedLevels:
    """Of the first `count` held-out pictures, with these weights: the average first."""

    cost: float
    left_out: list[str]
    count: int
    weights: tuple[str, ...]


@dataclass
class HeldOut:
    """The held-out pictures, encoded once, and what their errors are held against.

    x0, noise [N, C, h, w]; labels [N]; depth [N, 1, H, W] or None; mean, variance [1, C, 1, 1] of
    training latents; inside [L]: the levels that the schedule reaches; linear [N, L]: errors of the
    linear denoiser; names: of the pictures, by their content.
    """

    x0: Tensor
    noise: Tensor
    captions: list[str]
    labels: Tensor
    depth: Tensor | None
    mean: Tensor
    variance: Tensor
    inside: Tensor
    linear: Tensor
    names: list[str]

    def inputs(self, picture: Tensor) -> Inputs:
        """Of the pictures [B] int64, no condition dropped."""
        return Inputs(
            [self.captions[i] for i in picture.tolist()],
            self.labels[picture],
            torch.zeros(len(picture), dtype=torch.bool, device=self.x0.device),
            latent_size=tuple(self.x0.shape[-2:]),
            depth=None if self.depth is None else self.depth[picture],
        )


class NoiseLevelValidation(L.Callback):
    """Every `every` images seen and at the end: validation/bits_per_dim, see
    sdtrain.evaluation.noise_level_error, for EMA and raw weights.

    Each held-out picture has its own noise, the same at all levels, for all runs and at all times;
    it is used in an antithetic pair. Where the budget of looks has no room for all pictures, raw
    weights are left out where an average is kept, and then all but a power of two of the pictures,
    so that arms of a sweep look at the same ones. Every picture's error at every level is kept in
    validation/IMAGES_SEEN.json, for comparisons picture by picture. Ranks share the pictures;
    nothing here draws from a generator.

    Args:
        every: images seen between validations, 0 for none, also at the end.
        num_images: held-out pictures.
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
    ) -> None:
        at_least(every, 0, "callbacks.noise_levels.every")
        at_least(num_images, 2, "callbacks.noise_levels.num_images")
        self.every = every
        self.num_images = num_images
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
        inside = int(inside_of(module.model.objective.schedule).sum())
        # All ranks encode all pictures.
        around = costs.ranks * (costs.page + (STATISTICS * costs.encode if first else 0))
        encode = costs.ranks * costs.encode
        kinds = ("ema", "raw") if self.ema else ("raw",)
        one = encode + 2 * inside * len(kinds)
        left_out = []
        count = fitting(allowed - around, one, self.num_images)
        if count < self.num_images:
            if self.ema:
                left_out.append("raw weights")
                kinds = ("ema",)
                one = encode + 2 * inside
                count = fitting(allowed - around, one, self.num_images)
            if count < self.num_images:
                # One picture alone has no standard error.
                count = 2 ** int(math.log2(count)) if count > 1 else 0
                left_out.insert(0, f"{count} of {self.num_images} pictures")
        cost = around + count * one if count else 0.0
        return PlannedLevels(cost, left_out, count, kinds)

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
        numbers = {}
        for weights, errors in by_weights.items():
            prefix = "validation/" if weights == planned.weights[0] else "validation/raw_"
            numbers |= {f"{prefix}{name}": value for name, value in errors.summary().items()}
        self.latest = {
            k: v for k, v in numbers.items() if k.endswith(("/bits_per_dim", "/bits_saved"))
        }
        self._write(trainer, module, by_weights)
        numbers["validation/pictures"] = len(next(iter(by_weights.values())).errors)
        return numbers

    def _prepare(
        self, trainer: L.Trainer, model: LatentDiffusion, count: int, stopping: Stopping
    ) -> None:
        data = trainer.datamodule
        # No gradient is kept: what trains in its memory fits.
        self.batch_size = min(AT_ONCE, 4 * data.micro_batch(trainer.world_size))

        def encoded(pictures: Pictures, count: int) -> tuple[list[Row], Tensor]:
            rows = []
            parts = []
            # Ordinals as the loader's, so that a crop or flip, where there is one, is always the
            # same.
            for places in torch.arange(min(count, len(pictures))).split(self.batch_size):
                stopping.go_on()
                part = [pictures[(i, i)] for i in places.tolist()]
                rows += part
                parts.append(model.latents_of_rows(part))
            return rows, torch.cat(parts)

        rows, x0 = encoded(data.validation, count)
        _, known = encoded(data.train, STATISTICS)
        mean = known.mean((0, 2, 3), keepdim=True)
        variance = known.var((0, 2, 3), keepdim=True)
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
            mean=mean,
            variance=variance,
            inside=inside_of(model.objective.schedule),
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
        """By weights: of the average, where there is one, and of those as they are. Each rank takes
        every n-th picture.
        """
        held_out = self.held_out
        device = module.device

        def error(picture: Tensor, log_snr: Tensor, sign: Tensor) -> Tensor:
            noise = held_out.noise[picture] * sign.to(device).view(-1, 1, 1, 1)
            inputs = held_out.inputs(picture)
            x0 = held_out.x0[picture]
            return module.model.epsilon_error(x0, inputs, noise, log_snr.to(device))

        count = min(planned.count, len(held_out.x0))
        mine = torch.arange(count)[trainer.global_rank :: trainer.world_size]
        inside = held_out.inside
        by_weights = {}
        for weights in planned.weights:
            ema = self.ema if weights == "ema" else None
            measured = torch.zeros(count, int(inside.sum()), dtype=torch.float64)
            with eval_mode(module), averaged_weights(ema, module):
                measured[mine] = network_errors(
                    error, mine, LEVELS[inside], self.batch_size, go_on=stopping.go_on
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
            warn(f"{path} cannot be written: {error.strerror}. Training goes on without it.")
        lines = {}
        for weights, each in by_weights.items():
            mean = each.errors.mean(0)
            lines[f"network, {weights} weights"] = torch.where(held_out.inside, mean, math.nan)
        lines["linear denoiser"] = first.linear.mean(0)
        picture = curves(
            LEVELS,
            lines,
            x_label=LOG_SNR,
            y_label="mean squared error of epsilon",
            title=f"{seen} images seen, {count} pictures",
        )
        write_if_room(picture, self.run.validation_plot(seen))
        for logger in trainer.loggers:
            log_picture(logger, "validation/noise_levels", picture, seen)


def inside_of(schedule: Schedule) -> Tensor:
    """[L] bool: the levels that it reaches."""
    return (LEVELS >= schedule.log_snr_min) & (LEVELS <= schedule.log_snr_max)


def content_hash(row: Row) -> str:
    """Twelve digits by which a held-out picture is recognised in another run."""
    if row.image is None:
        content = row.moments.numpy().tobytes()
    else:
        content = ((row.image + 1) * 127.5).round().byte().numpy().tobytes()
    return hashlib.sha256(content + row.caption.encode()).hexdigest()[:12]
