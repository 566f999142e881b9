"""Writes every number to metrics.jsonl and to the logger. The file is the local truth: a logger may fail without harm."""

import json
import math
import time
from pathlib import Path

import lightning.pytorch as L
import torch
from lightning.pytorch.loggers import CSVLogger

from sdtrain.callbacks.intervals import due, window_ended
from sdtrain.checkpoints import published, write_text
from sdtrain.errors import DivergedError


def written_by(line: str, images_seen: int) -> bool:
    """Whether a line of metrics.jsonl belongs before images_seen: after a resume later ones are written again, and so is half a line."""
    try:
        return json.loads(line)["images_seen"] <= images_seen
    except (ValueError, KeyError, TypeError):
        return False


class MetricsLog(L.Callback):
    """Loss, learning rate, gradient norm and speed, every `every` images seen.

    The loss is the mean over all samples since the last line, over all ranks. A loss or gradient that was not finite moved no weight
    (see Optimisation.clip); here it ends the run with DivergedError, unless it may be skipped.
    """

    def __init__(self, *, every: int, run_dir: Path) -> None:
        self.every, self.path = every, run_dir / "metrics.jsonl"
        self.latest: dict[str, float] = {}
        self._sum, self._count, self._steps = 0.0, 0, []

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.started = self.last = time.monotonic()
        if trainer.is_global_zero and self.path.exists():
            seen = trainer.datamodule.images_seen
            kept = [line for line in self.path.read_text(encoding="utf-8").splitlines() if written_by(line, seen)]
            write_text(self.path, "".join(line + "\n" for line in kept))
            for logger in (each for each in trainer.loggers if isinstance(each, CSVLogger)):  # it begins its file anew
                for line in map(json.loads, kept):
                    logger.log_metrics({key: value for key, value in line.items() if key != "seconds"}, step=line["images_seen"])

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs, batch, batch_index: int) -> None:
        self._sum, self._count = self._sum + module.loss_sum, self._count + len(batch.caption)
        if not window_ended(trainer):
            return
        # What there is to say of each step since the last line, on the device: nothing waits for it unless it is needed.
        self._steps.append((trainer.datamodule.images_seen, module.norm, batch.ordinal, module.times))
        if due(self.every, trainer) or trainer.datamodule.images_seen >= module.optimisation.max_images:
            self._write(trainer, module)

    def _write(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        totals = torch.stack([self._sum, torch.as_tensor(self._count, device=self._sum.device, dtype=self._sum.dtype)])
        loss_sum, count = trainer.strategy.reduce(totals, reduce_op="sum").tolist()
        norms = torch.stack([norm for _, norm, _, _ in self._steps]).tolist()  # the same on all ranks
        now = time.monotonic()
        self.latest = {
            "train/loss": loss_sum / count, "train/lr": trainer.optimizers[0].param_groups[0]["lr"], "train/gradient_norm": module.norm.item(),
            "train/images_per_second": count / (now - self.last),
        }
        if module.optimisation.max_skipped is not None:
            self.latest["train/skipped_steps"] = module.optimisation.skipped
        steps, self._steps, self._sum, self._count, self.last = self._steps, [], 0.0, 0, now
        self.report(trainer, self.latest)
        bad = [step for step, norm in zip(steps, norms, strict=True) if not math.isfinite(norm)]
        if bad and module.optimisation.max_skipped is None:
            saved = " and the last checkpoint is good" if published(self.path.parent) else ""
            at, _, ordinals, times = bad[0]
            levels = f", t = {', '.join(f'{t:.3g}' for t in times.tolist()[:8])}" if times is not None else ""
            raise DivergedError(
                f"The loss or the gradient was not finite in {len(bad)} of the last {len(steps)} optimizer steps, first in the one that ended at {at} images "
                f"(samples {', '.join(map(str, ordinals.tolist()[:8]))}{levels}, the first of its last micro-batch on rank {trainer.global_rank}). No weight "
                f"has moved on it{saved}. Lower optimizer.lr (now {module.optimisation.settings[0]['lr']:g}) or trainer.gradient_clip, look at those "
                f"samples, or let up to n such steps be left out with trainer.max_skipped=n."
            )

    def report(self, trainer: L.Trainer, metrics: dict[str, float]) -> None:
        """One line in metrics.jsonl and one call of the logger, on rank 0."""
        if not trainer.is_global_zero:
            return
        seen = trainer.datamodule.images_seen
        with open(self.path, "a", encoding="utf-8") as file:
            finite = {key: value if math.isfinite(value) else None for key, value in metrics.items()}  # JSON has no NaN
            file.write(json.dumps({"images_seen": seen, "seconds": round(time.monotonic() - self.started, 3), **finite}) + "\n")
        for logger in trainer.loggers:
            logger.log_metrics({**metrics, "images_seen": seen}, step=seen)
