"""When a run ends: by its budget of images, by its limit of time, or by a signal, which ends a look
too; the same on all ranks.
"""

import time

import lightning.pytorch as L
import torch
import torch.distributed as dist

from sdtrain.console import warn
from sdtrain.signals import Interrupted, Signals, exit_code_of
from sdtrain.training.progress import Progress, window_ended


class LookInterruptedError(Exception):
    """Raised within a look, on all ranks, where one of them has received a signal."""


class Stopping(L.Callback):
    """Decides after each optimizer step whether it was the last.

    It stands before the callbacks that save and look, and after those that log: when the time is up
    one more step is taken, which everybody knows to be the last.

    Args:
        signals: what this process has received.
        max_minutes: limit of the time trained, by all processes of the run; None for no limit.
        progress: where the run stands.
    """

    def __init__(self, *, signals: Signals, max_minutes: float | None, progress: Progress) -> None:
        self.signals = signals
        self.max_minutes = max_minutes
        self.progress = progress
        self.interrupted_by = 0
        """The signal on which the run is to save and leave; 0 for none."""
        self._seconds_before = 0.0  # trained by earlier processes
        self._started = 0.0
        self._group = None

    @property
    def seconds_trained(self) -> float:
        """By all processes of the run."""
        return self._seconds_before + time.monotonic() - self._started

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        if trainer.world_size > 1:
            # The flag of a signal crosses ranks without touching a device.
            self._group = dist.new_group(backend="gloo")

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        limit = self.max_minutes
        if limit is None or self._seconds_before < 60 * limit:
            return
        # The earlier process had taken its last step.
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
        received, time_is_up = self._agreed()
        last = progress.ended
        if time_is_up and not last:
            progress.ends_at = progress.images_seen + progress.batch_size
        trainer.should_stop = trainer.should_stop or last
        self.interrupted_by = received

    def go_on(self) -> None:
        """To be called before each network evaluation of a look.

        Raises LookInterruptedError after a signal to any rank.
        """
        self._meet(looking=True)

    def wait_for_ranks(self) -> None:
        """Returns when all ranks have called it, those that look the longest last; before a look's
        ranks exchange anything, and after it. Raises as `go_on` does.
        """
        while self._group is not None and self._meet(looking=False):
            pass

    def leave(self, trainer: L.Trainer) -> None:
        """Raises Interrupted on all ranks, each with its exit code."""
        trainer.strategy.barrier()
        code = exit_code_of(self.interrupted_by) if trainer.is_global_zero else 0
        raise Interrupted(code)

    def _meet(self, looking: bool) -> bool:
        """Whether any rank still looks. The ranks meet at every call, so that a signal to one of
        them, which may only wait for the others, ends the look.
        """
        received, anyone_looks = self._largest(self.signals.received, looking)
        if received:
            self.interrupted_by = received
            raise LookInterruptedError
        return bool(anyone_looks)

    def _agreed(self) -> tuple[int, bool]:
        """(the signal that any rank has received, 0 for none; whether the time is up); the same on
        all ranks.
        """
        limit = self.max_minutes
        time_is_up = limit is not None and self.seconds_trained >= 60 * limit
        received, time_is_up = self._largest(self.signals.received, time_is_up)
        return received, bool(time_is_up)

    def _largest(self, first: int, second: int) -> tuple[int, int]:
        """Each number, as the rank has it where it is largest."""
        flags = torch.tensor([first, second])
        if self._group is not None:
            dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._group)
        return int(flags[0]), int(flags[1])


def disable_lightning_signals(trainer: L.Trainer) -> None:
    """Switches off two private parts of Lightning 2.6: its handler broadcasts inside a signal, and
    its check for SIGTERM reads the device at every micro-batch.
    """
    connector = trainer._signal_connector
    loop = trainer.fit_loop.epoch_loop
    assert callable(connector.register_signal_handlers)
    assert callable(loop._broadcast_sigterm_tensor)
    connector.register_signal_handlers = _do_nothing
    loop._broadcast_sigterm_tensor = _do_nothing


def _do_nothing() -> None:
    pass
