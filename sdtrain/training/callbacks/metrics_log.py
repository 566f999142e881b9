"""Writes every metric to metrics.jsonl and to the logger.

The file is the authoritative record: a run does not depend on its logger.
"""

import time
from pathlib import Path

import lightning.pytorch as L
from lightning.pytorch.loggers import CSVLogger

from sdtrain.console import warn
from sdtrain.errors import StorageError
from sdtrain.runs.layout import RunFolder
from sdtrain.runs.manifest import list_checkpoints
from sdtrain.runs.metrics import MetricsFile, metrics_line, remove_later_files
from sdtrain.training.callbacks.levels import EDGES, level_metrics
from sdtrain.training.callbacks.loss_sums import LossSums
from sdtrain.training.diverged import bad_steps, divergence_error
from sdtrain.training.loggers.media import log_levels
from sdtrain.training.progress import Progress, window_ended


class MetricsLog(L.Callback):
    """Logs loss, learning rate, gradient norm and speed every `every` images seen.

    The loss is the mean over all samples since the last line, over all ranks. A step with a loss or
    gradient that was not finite has changed no weight (see Optimisation.clip). Unless such steps
    may be skipped, it ends the run with DivergedError: at the next line, or before the next
    checkpoint is saved, so that the newest checkpoint is from before that step. Lines that cannot
    be written because the disk is full are kept and written later, at the latest at the end;
    StorageError is raised if that fails.
    """

    def __init__(self, *, every: int, run_dir: Path) -> None:
        self.every = every
        self.run = RunFolder(run_dir)
        self.file = MetricsFile(self.run.metrics)
        self.latest: dict[str, float] = {}
        self.losses = LossSums()
        self.started = 0.0  # shifted at a resume, so that the logged seconds continue
        self.last_line_at = 0.0
        self.last_line_seen = 0
        self.recorded: set[str] = set()
        """Metrics that an earlier process has logged at the images that this one resumes from."""

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.started = time.monotonic()
        seen = module.progress.images_seen
        if not trainer.is_global_zero:
            return
        remove_later_files(self.run, seen)
        records = self.file.truncate_after(seen)
        if records:
            self.started -= records[-1].get("seconds", 0.0)
        for record in records:
            if record["images_seen"] == seen:
                self.recorded |= record.keys()
        for logger in trainer.loggers:
            if isinstance(logger, CSVLogger):  # it starts with an empty file
                replay(records, logger)

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.last_line_at = time.monotonic()
        self.last_line_seen = module.progress.images_seen

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs, batch, batch_index: int
    ) -> None:
        progress = module.progress
        self.losses.add_micro_batch(batch, progress)
        trainer.datamodule.record_skipped(batch)
        if not window_ended(trainer):
            return
        self.losses.end_step(progress)
        if progress.is_due(self.every) or progress.ended:
            self._end_line(trainer, module)

    def on_save_checkpoint(
        self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict
    ) -> None:
        if module.optimisation.max_skipped is None and bad_steps(self.losses.steps):
            self._end_line(trainer, module)
        checkpoint["since_last_line"] = self.losses.totals(trainer, module)
        checkpoint["levels_since_last_line"] = self.losses.by_level(trainer, module)

    def on_load_checkpoint(
        self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict
    ) -> None:
        if trainer.is_global_zero and "since_last_line" in checkpoint:
            totals = checkpoint["since_last_line"]
            self.losses.restore(totals, checkpoint["levels_since_last_line"])

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not self.file.waiting:
            return
        failure_reason = self.file.write_waiting()
        if failure_reason:
            lost = len(self.file.waiting)
            raise StorageError(
                f"{failure_reason}. {lost} lines of it were not written and are lost",
                key="hydra.run.dir",
                remedy="Make the folder writable, or free space, and resume with resume=auto.",
            )

    def log_metrics(
        self,
        trainer: L.Trainer,
        progress: Progress,
        metrics: dict[str, float],
        lists: dict[str, list] | None = None,
    ) -> None:
        """Write one line to metrics.jsonl and log to each logger, on rank 0.

        lists: values by bin of log_snr; written to the file, and logged as histograms if the
        logger supports them.
        """
        if not trainer.is_global_zero:
            return
        seen = progress.images_seen
        seconds = time.monotonic() - self.started
        failure_reason = self.file.append(metrics_line(seen, seconds, metrics, lists or {}))
        if failure_reason:
            warn(f"{failure_reason}. Training continues; the line is kept and written later.")
        for logger in trainer.loggers:
            logger.log_metrics({**metrics, "images_seen": seen}, step=seen)
            if lists:
                log_levels(logger, lists, EDGES.tolist(), seen)

    def _end_line(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Log the metrics since the last line.

        Raises DivergedError if a step was not finite and may not be skipped.
        """
        losses = self.losses
        loss_sum, count = losses.totals(trainer, module).tolist()
        now = time.monotonic()
        seen = module.progress.images_seen
        self.latest = {
            "train/loss": loss_sum / count,
            "train/lr": trainer.optimizers[0].param_groups[0]["lr"],
            "train/gradient_norm": module.progress.step.shown_norm.item(),
            "train/images_per_second": (seen - self.last_line_seen) / (now - self.last_line_at),
        }
        levels = losses.by_level(trainer, module)
        may_skip = module.optimisation.max_skipped is not None
        if may_skip:
            self.latest["train/skipped_steps"] = module.progress.skipped_steps
        if trainer.datamodule.skipped is not None:
            self.latest["data/skipped"] = trainer.datamodule.skipped.synchronise()
        self.losses = LossSums()
        self.last_line_at = now
        self.last_line_seen = seen
        lists = {} if levels is None else level_metrics(levels)
        self.log_metrics(trainer, module.progress, self.latest, lists)
        bad = bad_steps(losses.steps)
        if bad and not may_skip:
            raise divergence_error(
                bad,
                len(losses.steps),
                progress=module.progress,
                lr=module.optimisation.lr,
                world_size=trainer.world_size,
                has_checkpoint=bool(list_checkpoints(self.run.path)),
            )


def replay(records: list[dict], logger: CSVLogger) -> None:
    """Log the metrics of earlier lines to a logger again."""
    for record in records:
        metrics = {}
        for key, value in record.items():
            if key != "seconds" and not isinstance(value, list):
                metrics[key] = value
        logger.log_metrics(metrics, step=record["images_seen"])
