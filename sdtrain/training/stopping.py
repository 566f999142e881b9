"""Decides when a run ends, the same on all ranks: at max_images, at the time limit, or after a
signal, which ends a look too.
"""

import time

import lightning.pytorch as L
import torch
import torch.distributed as dist

from sdtrain.console import warn
from sdtrain.signals import Interrupted, Signals, exit_code_of
from sdtrain.training.progress import Progress, window_ended


class LookInterruptedError(Exception):
    """Raised within a look, on all ranks, when one of them has received a signal."""


class Stopping(L.Callback):
    """Decides after each optimizer step whether it was the last one.

    It runs after the callbacks that log and before those that save, sample or validate. When the
    time is up one more step is taken, so that all callbacks know in advance that it is the last.

    Args:
        signals: the signals that this process has received.
        max_minutes: limit on the training time, summed over all processes of a run that was
            resumed; None for no limit.
        progress: progress of the run.
    """

    def __init__(self, *, signals: Signals, max_minutes: float | None, progress: Progress) -> None:
        self.signals = signals
        self.max_minutes = max_minutes
        self.progress = progress
        self.interrupted_by = 0
        """The signal after which the run must save and exit; 0 for none."""
        self._seconds_before = 0.0  # training time of earlier processes of this run
        self._started = 0.0
        self._group = None

    @property
    def seconds_trained(self) -> float:
        """Training time, including that of earlier processes of a resumed run."""
        return self._seconds_before + time.monotonic() - self._started

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        if trainer.world_size > 1:
            # Gloo, so that ranks exchange signals without waiting for a device.
            self._group = dist.new_group(backend="gloo")

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        limit = self.max_minutes
        if limit is None or self._seconds_before < 60 * limit:
            return
        # The earlier process has taken the last step already.
        self.progress.ends_at = self.progress.images_seen
        trainer.should_stop = True
        if trainer.is_global_zero:
            minutes = self._seconds_before / 60
            warn(
                f"There is nothing left to train: trainer.max_minutes={limit:g}, and {minutes:.3g} "
                "minutes were trained."
            )

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._started = time.monotonic()

    def on_save_checkpoint(
        self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict
    ) -> None:
        checkpoint["seconds_trained"] = self.seconds_trained

    def on_load_checkpoint(
        self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict
    ) -> None:
        self._seconds_before = checkpoint.get("seconds_trained", 0.0)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs, batch, batch_index: int
    ) -> None:
        if not window_ended(trainer):
            return
        progress = self.progress
        signal_received, time_is_up = self._agree()
        last = progress.ended
        if time_is_up and not last:
            progress.ends_at = progress.images_seen + progress.batch_size
        trainer.should_stop = trainer.should_stop or last
        self.interrupted_by = signal_received

    def check_interrupted(self) -> None:
        """Raise LookInterruptedError if any rank has received a signal.

        Looks call it before each network evaluation.
        """
        self._sync(is_busy=True)

    def wait_for_ranks(self) -> None:
        """Block until every rank has called this. Called after a look, and within a look before the
        ranks exchange results. Raises LookInterruptedError if any rank has received a signal.
        """
        while self._group is not None and self._sync(is_busy=False):
            pass

    def raise_interrupted(self, trainer: L.Trainer) -> None:
        """Raise Interrupted on all ranks, each with its exit code."""
        trainer.strategy.barrier()
        code = exit_code_of(self.interrupted_by) if trainer.is_global_zero else 0
        raise Interrupted(code)

    def _sync(self, is_busy: bool) -> bool:
        """Exchange signals with the other ranks; return whether any rank is busy with a look.

        Every rank takes part in every call, so that a signal to a rank that only waits for the
        others ends the look too.
        """
        signal_received, any_busy = self._max_over_ranks(self.signals.received, is_busy)
        if signal_received:
            self.interrupted_by = signal_received
            raise LookInterruptedError
        return bool(any_busy)

    def _agree(self) -> tuple[int, bool]:
        """Return (a signal that any rank has received, 0 for none; whether the time is up); the
        same on all ranks.
        """
        limit = self.max_minutes
        time_is_up = limit is not None and self.seconds_trained >= 60 * limit
        signal_received, time_is_up = self._max_over_ranks(self.signals.received, time_is_up)
        return signal_received, bool(time_is_up)

    def _max_over_ranks(self, first: int, second: int) -> tuple[int, int]:
        """Return the maximum over all ranks of each number."""
        flags = torch.tensor([first, second])
        if self._group is not None:
            dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._group)
        return int(flags[0]), int(flags[1])


def disable_lightning_signals(trainer: L.Trainer) -> None:
    """Disable two private parts of Lightning 2.6: its signal handler, which broadcasts from within
    the handler, and its check for SIGTERM, which reads the device at every micro-batch.
    """
    connector = trainer._signal_connector
    loop = trainer.fit_loop.epoch_loop
    assert callable(connector.register_signal_handlers)
    assert callable(loop._broadcast_sigterm_tensor)
    connector.register_signal_handlers = _do_nothing
    loop._broadcast_sigterm_tensor = _do_nothing


def _do_nothing() -> None:
    pass
