"""Validation that means the same under every schedule: the error of epsilon by noise level, on
held-out pictures.
"""

import hashlib
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as L
import torch
from torch import Tensor

from sdtrain.conditioning.interface import Inputs
from sdtrain.config.schema import at_least
from sdtrain.console import warn
from sdtrain.errors import UserError
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
from sdtrain.plots import curves
from sdtrain.randomness import KeyedRandom
from sdtrain.runs.layout import RunFolder
from sdtrain.training.callbacks.ema import EMACallback, averaged_weights
from sdtrain.training.callbacks.metrics_log import MetricsLog
from sdtrain.training.loggers.media import log_picture
from sdtrain.training.progress import window_ended
from sdtrain.types import Row

STATISTICS = 256
"""Training pictures behind the linear denoiser."""
FIRST = 4
"""Pictures by which the cost of one is measured."""


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
    it is used in an antithetic pair. In mid-run there are as many pictures as fit into `share` of
    the time, and all num_images at the end. Every picture's error at every level is kept in
    validation/IMAGES_SEEN.json, for comparisons picture by picture. Ranks share the pictures;
    nothing here draws from a generator.

    Args:
        every: images seen between validations, 0 for none, also at the end.
        num_images: held-out pictures.
        share: of the time of training that validations in mid-run may take, what comes before the
            first included; 1 takes all pictures each time.
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
        at_least(every, 0, "callbacks.noise_levels.every")
        at_least(num_images, 2, "callbacks.noise_levels.num_images")
        if not 0 < share <= 1:
            raise UserError("must lie in (0, 1]", key="callbacks.noise_levels.share", value=share)
        self.every = every
        self.num_images = num_images
        self.share = share
        self.run = RunFolder(run_dir)
        self.metrics_log = metrics_log
        self.ema = ema
        self.count: int | None = num_images if share == 1 else None
        """Pictures in mid-run, once their cost is known."""
        self.random = KeyedRandom(0, "noise levels")
        self.held_out: HeldOut | None = None
        self.latest: dict[str, float] = {}

    @property
    def state_key(self) -> str:
        return "noise_levels"

    def state_dict(self) -> dict:
        return {"count": self.count, "every": self.every, "share": self.share}

    def load_state_dict(self, state: dict) -> None:
        same = (state.get("every"), state.get("share")) == (self.every, self.share)
        if self.share < 1 and same:
            self.count = state["count"]  # a resumed run validates on what it did before

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.began = time.monotonic()
        self.began_at = module.progress.images_seen

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs, batch, batch_index: int
    ) -> None:
        if not self.every or not window_ended(trainer):
            return
        last = module.progress.ended
        if last or module.progress.is_due(self.every):
            self.validate(trainer, module, last)

    def validate(self, trainer: L.Trainer, module: L.LightningModule, last: bool) -> None:
        entered = time.monotonic()
        if self.held_out is None:
            self._prepare(trainer, module.model)
        if self.count is None and not last:
            self.count = self._affordable(trainer, module, entered)
        count = min(len(self.held_out.x0), self.num_images if last else self.count)
        by_weights = self._errors(trainer, module, count)
        if not trainer.is_global_zero:
            return
        numbers = {}
        for weights, errors in by_weights.items():
            is_main = weights == "ema" or len(by_weights) == 1
            prefix = "validation/" if is_main else "validation/raw_"
            numbers |= {f"{prefix}{name}": value for name, value in errors.summary().items()}
        self.latest = {k: v for k, v in numbers.items() if k.endswith("/bits_per_dim")}
        self._write(trainer, module, by_weights)
        numbers["validation/pictures"] = count
        numbers["validation/seconds"] = round(time.monotonic() - entered, 3)
        self.metrics_log.report(trainer, module.progress, numbers)

    def _affordable(self, trainer: L.Trainer, module: L.LightningModule, entered: float) -> int:
        """How many pictures in mid-run fit into the share, by the cost of the first few; the same
        on all ranks.
        """
        began = time.monotonic()
        self._errors(trainer, module, FIRST)
        now = time.monotonic()
        progress = module.progress
        images = progress.max_images - self.began_at
        seconds_an_image = (entered - self.began) / (progress.images_seen - self.began_at)
        validations = max(1, images // self.every)
        allowed = (self.share * images * seconds_an_image - (now - entered)) / validations
        pictures = max(1.0, allowed * FIRST / (now - began))
        # A power of two, so that runs of about the same speed validate on the same pictures.
        return trainer.strategy.broadcast(max(2, 2 ** int(math.log2(pictures))))

    def _prepare(self, trainer: L.Trainer, model: LatentDiffusion) -> None:
        data = trainer.datamodule
        # No gradient is kept: what trains in its memory fits.
        self.batch_size = min(256, 4 * data.micro_batch(trainer.world_size))
        # Ordinals as the loader's, so that a crop or flip, where there is one, is always the same.
        rows = [data.validation[(i, i)] for i in range(min(self.num_images, len(data.validation)))]
        train = [data.train[(i, i)] for i in range(min(STATISTICS, len(data.train)))]
        x0 = self._encode(model, rows)
        known = self._encode(model, train)
        mean = known.mean((0, 2, 3), keepdim=True)
        variance = known.var((0, 2, 3), keepdim=True)
        noise = [torch.from_numpy(self.random.normal(i, x0.shape[1:])) for i in range(len(rows))]
        schedule = model.objective.schedule
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
            inside=(LEVELS >= schedule.log_snr_min) & (LEVELS <= schedule.log_snr_max),
            linear=linear_errors(x0, mean, variance),
            names=[content_hash(row) for row in rows],
        )

    def _encode(self, model: LatentDiffusion, rows: list[Row]) -> Tensor:
        size = min(64, self.batch_size)
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        return torch.cat([model.latents_of_rows(part) for part in parts])

    def _errors(
        self, trainer: L.Trainer, module: L.LightningModule, count: int
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

        count = min(count, len(held_out.x0))
        mine = torch.arange(count)[trainer.global_rank :: trainer.world_size]
        inside = held_out.inside
        by_weights = {}
        for weights in ("ema", "raw") if self.ema else ("raw",):
            ema = self.ema if weights == "ema" else None
            measured = torch.zeros(count, int(inside.sum()), dtype=torch.float64)
            with eval_mode(module), averaged_weights(ema, module):
                measured[mine] = network_errors(error, mine, LEVELS[inside], self.batch_size)
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
            x_label="log_snr",
            y_label="mean squared error of epsilon",
            title=f"{seen} images seen, {count} pictures",
        )
        write_if_room(picture, self.run.validation_plot(seen))
        for logger in trainer.loggers:
            log_picture(logger, "validation/noise_levels", picture, seen)


def content_hash(row: Row) -> str:
    """Twelve digits by which a held-out picture is recognised in another run."""
    if row.image is None:
        content = row.moments.numpy().tobytes()
    else:
        content = ((row.image + 1) * 127.5).round().byte().numpy().tobytes()
    return hashlib.sha256(content + row.caption.encode()).hexdigest()[:12]
