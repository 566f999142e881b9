"""The progress bar, counted in images."""

import lightning.pytorch as L
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from sdtrain.training.callbacks.metrics_log import MetricsLog
from sdtrain.training.progress import window_ended


class ProgressBar(L.Callback):
    """Shows a progress bar with loss, images/s and time left.

    If the output is not a terminal, prints a plain line at each tenth of the run instead.
    """

    def __init__(self, *, metrics_log: MetricsLog, console: Console) -> None:
        self.metrics_log = metrics_log
        self.console = console
        self.bar: Progress | None = None
        self.task = None
        self.tenths_done = 0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        total = module.progress.max_images
        seen = module.progress.images_seen
        self.tenths_done = 10 * seen // total
        if not trainer.is_global_zero or not self.console.is_terminal:
            return
        self.bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("images  {task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.task = self.bar.add_task("training", total=total, completed=seen, numbers="")
        self.bar.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs, batch, batch_index: int
    ) -> None:
        if not window_ended(trainer) or not trainer.is_global_zero:
            return
        total = module.progress.max_images
        seen = module.progress.images_seen
        if self.bar is not None:
            self.bar.update(self.task, completed=min(seen, total), numbers=self._latest_numbers())
        elif 10 * seen // total > self.tenths_done:
            self.tenths_done = 10 * seen // total
            self.console.print(f"{seen} of {total} images  {self._latest_numbers()}")

    def teardown(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _latest_numbers(self) -> str:
        latest = self.metrics_log.latest
        if not latest:
            return ""
        speed = latest["train/images_per_second"]
        return f"loss {latest['train/loss']:.4f}  {speed:.0f} images/s"
