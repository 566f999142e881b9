"""Saves checkpoints between optimizer steps, and resumes from them exactly."""

import contextlib
import math
import os
import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import lightning.pytorch as L
import torch
import torch.distributed as dist
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO

from sdtrain.errors import DivergedError, StorageError, UserError
from sdtrain.runs.checkpoint import (
    damage,
    not_finite,
    published,
    read_trainer,
    read_weights,
    size_of,
    snapshot,
    write_checkpoint,
)
from sdtrain.training.callbacks.intervals import due, ended, window_ended


def memory_available() -> float:
    """Bytes that can be taken without swapping, or before a container's limit; inf where the system does not say."""
    free = math.inf
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(
            1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")
        )
    with contextlib.suppress(OSError, ValueError):  # "max" is no limit
        limit, used = (
            int(Path("/sys/fs/cgroup", name).read_text())
            for name in ("memory.max", "memory.current")
        )
        free = min(free, limit - used)
    return free


class Interrupted(SystemExit):
    """Raised after a signal, once the checkpoint is written. Ranks above 0 leave with 0: when one does not, Lightning kills the whole job."""


class Signals:
    """The first SIGTERM, SIGINT, SIGUSR1 or SIGHUP is remembered until a step ends; a second SIGTERM, SIGINT or SIGHUP ends the process at once."""

    def __init__(self) -> None:
        self.received = 0

    def install(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            if (
                number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
            ):  # nohup means it
                signal.signal(number, self)

    def __call__(self, number: int, frame) -> None:
        if self.received and number != signal.SIGUSR1:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = self.received or number


def leave_signals_to_us(trainer: L.Trainer) -> None:
    """Takes two private parts from Lightning 2.6: its handler broadcasts inside a signal, and its check reads the device at every micro-batch."""
    connector, loop = trainer._signal_connector, trainer.fit_loop.epoch_loop
    assert callable(connector.register_signal_handlers) and callable(loop._broadcast_sigterm_tensor)
    connector.register_signal_handlers = lambda: None
    loop._broadcast_sigterm_tensor = lambda: None


class FolderIO(CheckpointIO):
    """Lightning's checkpoint dictionary to and from sdtrain's checkpoint folder.

    Saving stalls training for a copy in memory; a thread writes it. A save that fails is tried once more and reported, and training goes
    on until max_failed_saves in a row have failed. Older checkpoints go when a newer one is published, all but the newest `keep`.

    Args:
        config: the run's yaml.
        report: takes a line for the user. memory: bytes that a copy may take.
    """

    def __init__(
        self,
        *,
        config: str,
        keep: int,
        max_failed_saves: int,
        report: Callable[[str], None],
        memory: Callable[[], float] = memory_available,
    ) -> None:
        self.config, self.keep, self.max_failed_saves, self.report, self.memory = (
            config,
            keep,
            max_failed_saves,
            report,
            memory,
        )
        self.writer: ThreadPoolExecutor | None = None
        self.pending: Future | None = None
        self.failure: StorageError | None = None
        self.failures = 0

    def save_checkpoint(self, checkpoint: dict, path, storage_options=None) -> None:
        self.wait()
        state = dict(checkpoint)
        weights, callbacks = state.pop("state_dict"), dict(state["callbacks"])
        ema = callbacks.pop("ema", None)
        if ema is not None:
            state["ema_steps"] = ema["steps"]
        state["callbacks"] = callbacks
        if bad := not_finite(weights) or (ema and not_finite(ema["weights"])):
            raise DivergedError(
                f"{bad} is not finite at {Path(path).name} images: it is not saved. Lower optimizer.lr, or look at the data."
            )
        parts = (weights, ema and ema["weights"], state)
        if self.memory() < 2 * size_of(parts):
            self.publish(
                Path(path), parts
            )  # no room for a copy: training waits, and the tensors are written one by one
            return
        self.writer = self.writer or ThreadPoolExecutor(1, "checkpoint")
        self.pending = self.writer.submit(self.publish, Path(path), snapshot(parts))

    def publish(self, folder: Path, parts: tuple) -> None:
        for attempt in (1, 2):
            try:
                write_checkpoint(folder, *parts, self.config)
            except StorageError as error:
                self.failure = error
                time.sleep(1.0 if attempt == 1 else 0.0)
            else:
                self.failure, self.failures = None, 0
                for old in published(folder.parent.parent)[: -self.keep]:
                    shutil.rmtree(old, ignore_errors=True)
                return
        self.failures += 1

    def settle(self) -> None:
        """Until the save under way has ended, well or not."""
        if self.pending is not None:
            pending, self.pending = self.pending, None
            pending.result()

    def wait(self, last: bool = False) -> None:
        """The same. Raises StorageError where too many have failed in a row, and where the last one has."""
        self.settle()
        if self.failure is not None:
            if last or self.failures > self.max_failed_saves:
                raise self.failure
            self.report(
                f"{self.failure} Training goes on; {self.failures} of at most {self.max_failed_saves} saves in a row have failed."
            )
            self.failure = None

    def load_checkpoint(self, path, map_location=None, weights_only=None) -> dict:
        folder = Path(path)
        if reason := damage(folder):
            raise StorageError(f"The checkpoint {folder} is not whole: {reason}.")
        state = read_trainer(folder)
        state["state_dict"] = read_weights(folder, "model")
        weights = read_weights(folder, "ema")
        if bad := not_finite(state["state_dict"]) or not_finite(weights or {}):
            raise DivergedError(
                f"{bad} in the checkpoint {folder} is not finite. Remove that folder to go on from the one before it, or start anew."
            )
        if weights is not None:
            state["callbacks"]["ema"] = {"steps": state.pop("ema_steps"), "weights": weights}
        return state

    def remove_checkpoint(self, path) -> None:
        shutil.rmtree(path, ignore_errors=True)


class Checkpoints(L.Callback):
    """Saves every `every` images seen, at the end, and after a signal; keeps the newest `keep` (at least 2), see FolderIO."""

    def __init__(
        self,
        *,
        every: int,
        keep: int,
        max_failed_saves: int,
        run_dir: Path,
        signals: Signals,
        max_minutes: float | None,
    ) -> None:
        if every < 1 or keep < 2 or max_failed_saves < 0:
            raise UserError(
                f"checkpoint.every={every} must be at least 1 image, checkpoint.keep={keep} at least 2 (a damaged one needs a spare), and "
                f"checkpoint.max_failed_saves={max_failed_saves} at least 0."
            )
        self.every, self.run_dir, self.signals, self.max_minutes = (
            every,
            run_dir,
            signals,
            max_minutes,
        )
        self.before = 0.0  # seconds trained by earlier processes
        self.group = None

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        # Ranks that torchrun started may have resolved another folder name: rank 0's is the run's.
        self.run_dir = Path(trainer.strategy.broadcast(str(self.run_dir)))
        if trainer.world_size > 1:
            self.group = dist.new_group(
                backend="gloo"
            )  # the flag of a signal crosses ranks without touching a device
        if trainer.is_global_zero:
            for left_over in (
                path
                for folder in ("", "checkpoints", "samples")
                for path in (self.run_dir / folder).glob(".*.tmp")
            ):
                shutil.rmtree(
                    left_over, ignore_errors=True
                ) if left_over.is_dir() else left_over.unlink(missing_ok=True)

    def on_load_checkpoint(
        self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict
    ) -> None:
        """Lightning counts micro-batches and steps; images are the truth. Its counters are rewritten for this run's ranks and accumulation."""
        self.before = checkpoint.get("seconds_trained", 0.0)
        data = trainer.datamodule
        steps, rest = divmod(checkpoint[type(data).__qualname__]["images_seen"], data.batch_size)
        if rest:
            seen = steps * data.batch_size + rest
            raise UserError(
                f"data.batch_size={data.batch_size} does not divide the {seen} images that the checkpoint has seen. Keep the first run's."
            )
        micro, loop = steps * trainer.accumulate_grad_batches, checkpoint["loops"]["fit_loop"]
        progress = loop["epoch_loop.batch_progress"]
        for part in (progress["total"], progress["current"]):
            lag = (
                part["completed"] - part["processed"]
            )  # -1: saved inside on_train_batch_end, and Lightning reckons with it
            part.update(ready=micro, started=micro, processed=micro, completed=micro + lag)
        for part in loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"][
            "step"
        ].values():
            part.update(ready=steps, completed=steps)

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.started = time.monotonic()

    def on_save_checkpoint(
        self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict
    ) -> None:
        checkpoint["seconds_trained"] = self.seconds

    @property
    def seconds(self) -> float:
        """Trained so far, by all processes of the run."""
        return self.before + time.monotonic() - self.started

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs, batch, batch_index: int
    ) -> None:
        if not window_ended(trainer):
            return
        (number, late), last = self.agreed(), ended(trainer, module)
        if late and not last:  # one step more, which everybody knows to be the last
            trainer.datamodule.ends_at = (
                trainer.datamodule.images_seen + trainer.datamodule.batch_size
            )
        trainer.should_stop = trainer.should_stop or last
        if due(self.every, trainer) or last or number:
            trainer.save_checkpoint(
                self.run_dir / "checkpoints" / f"{trainer.datamodule.images_seen:012d}"
            )  # on all ranks: it has a barrier
        if last or number:
            trainer.strategy.checkpoint_io.wait(last=True)
        if number and not last:
            trainer.strategy.barrier()
            # 143 for a request to leave, SIGTERM's or the SIGUSR1 that schedulers send before it; 130 for Ctrl-C.
            raise Interrupted(
                (130 if number == signal.SIGINT else 143) if trainer.is_global_zero else 0
            )

    def agreed(self) -> tuple[int, bool]:
        """(the signal that any rank has received, 0 for none; whether the time is up); the same on all ranks."""
        flags = torch.tensor(
            [
                self.signals.received,
                self.max_minutes is not None and self.seconds >= 60 * self.max_minutes,
            ]
        )
        if self.group is not None:
            dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.group)
        return int(flags[0]), bool(flags[1])
