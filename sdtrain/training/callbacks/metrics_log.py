"""Writes every number to metrics.jsonl and to the logger. The file is the local truth: a logger may fail without harm."""

import contextlib
import json
import math
import os
import re
import sys
import time
from pathlib import Path

import lightning.pytorch as L
import torch
import torch.distributed as dist
from lightning.pytorch.loggers import CSVLogger

from sdtrain.errors import DivergedError, StorageError
from sdtrain.files import write_text
from sdtrain.runs.layout import RunFolder
from sdtrain.runs.manifest import published
from sdtrain.training.callbacks.levels import EDGES, by_level, described
from sdtrain.training.loggers.media import log_levels
from sdtrain.training.progress import Progress, window_ended


def written_by(line: str, images_seen: int) -> bool:
    """Whether a line of metrics.jsonl belongs before images_seen: after a resume later ones are written again, and so is half a line."""
    try:
        return json.loads(line)["images_seen"] <= images_seen
    except (ValueError, KeyError, TypeError):
        return False


def drop_later(run_dir: Path, images_seen: int) -> None:
    """Removes looks and samples of an earlier process that got further than the checkpoint: this one makes its own, or ends before."""
    for path in (
        path for folder in ("validation", "samples") for path in (run_dir / folder).glob("*")
    ):
        if (number := re.fullmatch(r"(?:[a-z_]+-)?(\d{9,})[.](?:json|png)", path.name)) and int(
            number[1]
        ) > images_seen:
            with contextlib.suppress(OSError):
                path.unlink()


class MetricsLog(L.Callback):
    """Loss, learning rate, gradient norm and speed, every `every` images seen.

    The loss is the mean over all samples since the last line, over all ranks. A loss or gradient that was not finite moved no weight
    (see Optimisation.clip); here it ends the run with DivergedError, unless it may be skipped: at the next line, or before the next
    checkpoint, so that the newest one is from before that step. Lines that the disk refuses are kept until it has room, at the latest at
    the end, or StorageError is raised.
    """

    def __init__(self, *, every: int, run_dir: Path) -> None:
        self.every, self.path = every, RunFolder(run_dir).metrics
        self.latest: dict[str, float] = {}
        self._sum, self._count, self._parts, self._steps = 0.0, 0, [], []
        self._levels: torch.Tensor | float = 0.0  # of an earlier process, since its last line
        self._unwritten: list[str] = []

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.started = self.last = time.monotonic()
        self.seen = module.progress.images_seen  # at the last line, or the start
        if trainer.is_global_zero:
            drop_later(self.path.parent, self.seen)
        if trainer.is_global_zero and self.path.exists():
            kept = [
                line
                for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines()
                if written_by(line, self.seen)
            ]
            try:
                write_text(self.path, "".join(line + "\n" for line in kept))
            except OSError as error:
                raise StorageError(
                    f"{self.path} cannot be written: {error.strerror}. Free space, and resume with resume=auto."
                ) from error
            self.started -= (
                json.loads(kept[-1]).get("seconds", 0.0) if kept else 0.0
            )  # the clock goes on
            for logger in (
                each for each in trainer.loggers if isinstance(each, CSVLogger)
            ):  # it begins its file anew
                for line in map(json.loads, kept):
                    numbers = {
                        key: value
                        for key, value in line.items()
                        if key != "seconds" and not isinstance(value, list)
                    }
                    logger.log_metrics(numbers, step=line["images_seen"])

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs, batch, batch_index: int
    ) -> None:
        self._sum, self._count = (
            self._sum + module.progress.per_sample.sum(),
            self._count + len(batch.caption),
        )
        self._parts.append((batch.ordinal, module.progress.per_sample, module.progress.times))
        trainer.datamodule.note_skipped(batch)
        if not window_ended(trainer):
            return
        # What there is to say of each step since the last line, on the device: nothing waits for it unless it is needed.
        self._steps.append(
            (
                module.progress.images_seen,
                (module.progress.step.loss, module.progress.step.norm),
                self._parts,
            )
        )
        self._parts = []
        if module.progress.is_due(self.every) or module.progress.ended:
            self._write(trainer, module)

    def on_save_checkpoint(
        self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict
    ) -> None:
        if module.optimisation.max_skipped is None and self._bad():
            self._write(trainer, module)
        checkpoint["since_last_line"] = self._totals(trainer, module)
        checkpoint["levels_since_last_line"] = self._by_level(trainer, module)

    def on_load_checkpoint(
        self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict
    ) -> None:
        if trainer.is_global_zero and "since_last_line" in checkpoint:
            self._sum, self._count = (
                checkpoint["since_last_line"][0],
                int(checkpoint["since_last_line"][1]),
            )
            self._levels = (
                0.0
                if checkpoint["levels_since_last_line"] is None
                else checkpoint["levels_since_last_line"]
            )

    def _totals(self, trainer: L.Trainer, module: L.LightningModule) -> torch.Tensor:
        """(sum of the losses, their number) since the last line, over all ranks."""
        mine = torch.stack(
            [
                torch.as_tensor(value, device=module.device, dtype=torch.float32)
                for value in (self._sum, self._count)
            ]
        )
        return trainer.strategy.reduce(mine, reduce_op="sum")

    def _by_level(self, trainer: L.Trainer, module: L.LightningModule) -> torch.Tensor | None:
        """The same by noise level, see callbacks.levels; None for an autoencoder."""
        parts = [part for _, _, parts in self._steps for part in parts]
        if module.progress.times is None:
            return None
        losses, times = (
            torch.cat([part[place] for part in parts]) if parts else torch.zeros(0)
            for place in (1, 2)
        )
        mine = self._levels + by_level(module.model.objective.schedule, losses, times)
        return trainer.strategy.reduce(mine.to(module.device), reduce_op="sum").cpu()

    def _bad(self) -> list[tuple]:
        """(images seen, loss, norm, parts) of the steps since the last line that were not finite; the same steps on all ranks."""
        if not self._steps:
            return []
        judged = torch.stack([torch.stack(pair) for _, pair, _ in self._steps]).tolist()
        steps = zip(self._steps, judged, strict=True)
        return [
            (seen, loss, norm, parts)
            for (seen, _, parts), (loss, norm) in steps
            if not math.isfinite(loss + norm)
        ]

    def _write(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        loss_sum, count = self._totals(trainer, module).tolist()
        now, seen = time.monotonic(), module.progress.images_seen
        self.latest = {
            "train/loss": loss_sum / count,
            "train/lr": trainer.optimizers[0].param_groups[0]["lr"],
            "train/gradient_norm": module.progress.step.shown_norm.item(),
            "train/images_per_second": (seen - self.seen) / (now - self.last),
        }
        levels = self._by_level(trainer, module)
        if module.optimisation.max_skipped is not None:
            self.latest["train/skipped_steps"] = module.progress.skipped_steps
        if trainer.datamodule.skipped is not None:
            self.latest["data/skipped"] = trainer.datamodule.skipped.agree()
        bad, steps, self._steps, self._sum, self._count, self.last, self.seen = (
            self._bad(),
            len(self._steps),
            [],
            0.0,
            0,
            now,
            seen,
        )
        self._levels = 0.0
        self.report(
            trainer, module.progress, self.latest, {} if levels is None else described(levels)
        )
        if bad and module.optimisation.max_skipped is None:
            raise DivergedError(self._diverged(trainer, module, bad, steps))

    def _diverged(
        self, trainer: L.Trainer, module: L.LightningModule, bad: list[tuple], steps: int
    ) -> str:
        """The paragraph. It names the samples of the first bad step, on any rank, whose own loss was not finite, or any of them if all were."""
        seen, loss, norm, parts = bad[0]
        rows = [
            row
            for part in parts
            for row in zip(*(column.tolist() for column in part if column is not None), strict=True)
        ]
        ranks = [rows]
        if trainer.world_size > 1:
            ranks = [None] * trainer.world_size
            dist.all_gather_object(ranks, rows)
        rows = sorted(row for rank in ranks for row in rank)
        named = ([row for row in rows if not math.isfinite(row[1])] or rows)[:8]
        times = f", t = {', '.join(f'{row[2]:.3g}' for row in named)}" if len(named[0]) > 2 else ""
        size, saved = (
            module.progress.batch_size,
            " and the last checkpoint is good" if published(self.path.parent) else "",
        )
        return (
            f"The loss or the gradient was not finite in {len(bad)} of the last {steps} optimizer steps, first in step {seen // size}, which ended at "
            f"{seen} images (samples {', '.join(str(row[0]) for row in named)}{times}; loss {loss / size:g}, gradient norm {norm:g}). No weight has moved "
            f"on it{saved}. Lower optimizer.lr (now {module.optimisation.lr:g}) or trainer.gradient_clip, look at those samples, or let "
            f"up to n such steps be left out with trainer.max_skipped=n."
        )

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self._unwritten and (refused := self._append()):
            raise StorageError(
                f"{refused} {len(self._unwritten)} lines are lost. Free space, and resume with resume=auto."
            )

    def _append(self) -> str | None:
        """Adds the lines that wait, all or none. Returns what the disk says against it."""
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("".join(self._unwritten))
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(self.path, size)  # no half a line stays, to be continued by the next
            return f"{self.path} cannot be written: {error.strerror}."
        self._unwritten.clear()
        return None

    def report(
        self,
        trainer: L.Trainer,
        progress: Progress,
        metrics: dict[str, float],
        lists: dict[str, list] | None = None,
    ) -> None:
        """One line in metrics.jsonl and one call of the logger, on rank 0. lists go to the file, and as histograms to a logger that takes them."""
        if not trainer.is_global_zero:
            return
        seen = progress.images_seen
        finite = {
            key: value if math.isfinite(value) else None for key, value in metrics.items()
        }  # JSON has no NaN
        self._unwritten.append(
            json.dumps(
                {
                    "images_seen": seen,
                    "seconds": round(time.monotonic() - self.started, 3),
                    **finite,
                    **(lists or {}),
                }
            )
            + "\n"
        )
        if refused := self._append():
            print(
                f"sdtrain: {refused} Training goes on, and its lines wait for room.",
                file=sys.stderr,
                flush=True,
            )
        for logger in trainer.loggers:
            logger.log_metrics({**metrics, "images_seen": seen}, step=seen)
            if lists:
                log_levels(logger, lists, EDGES.tolist(), seen)
