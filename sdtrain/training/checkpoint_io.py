"""Lightning's checkpoint dictionary to and from sdtrain's folder, written by a thread."""

import contextlib
import math
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from torch import Tensor

from sdtrain.errors import DivergedError, StorageError
from sdtrain.runs.checkpoint import (
    not_finite,
    read_trainer,
    read_weights,
    size_of,
    snapshot,
    write_checkpoint,
)
from sdtrain.runs.layout import CheckpointFolder
from sdtrain.runs.manifest import damage, published

RETRY_AFTER = 1.0  # seconds between the two attempts of a save
EMA = "ema"
"""Key of the average's state among those of the callbacks."""


def memory_available() -> float:
    """Bytes that can be taken without swapping, or before a container's limit; inf where the system
    does not say.
    """
    free = math.inf
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(line for line in lines if line.startswith("MemAvailable:"))
        free = 1024.0 * int(available.split()[1])
    with contextlib.suppress(OSError, ValueError):  # "max" is no limit
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        free = min(free, limit - used)
    return free


class FolderIO(CheckpointIO):
    """Saving stalls training for a copy in memory; a thread writes it.

    A save that fails is tried once more and reported, and training goes on until max_failed_saves
    in a row have failed. Older checkpoints go when a newer one is published, all but the newest
    `keep`.

    Args:
        config: the run's yaml.
        report: takes a line for the user.
        memory: bytes that a copy may take.
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
        self.config = config
        self.keep = keep
        self.max_failed_saves = max_failed_saves
        self.report = report
        self.memory = memory
        self.writer: ThreadPoolExecutor | None = None
        self.pending: Future | None = None
        self.failure: StorageError | None = None
        self.failures = 0

    def save_checkpoint(self, checkpoint: dict, path, storage_options=None) -> None:
        self.wait()
        folder = Path(path)
        weights, average, state = split_checkpoint(checkpoint)
        bad = not_finite(weights) or not_finite(average or {})
        if bad:
            raise DivergedError(
                f"{bad} is not finite at {folder.name} images: it is not saved",
                key="optimizer.lr",
                remedy="Lower optimizer.lr, or look at the data.",
            )
        parts = (weights, average, state)
        if self.memory() < 2 * size_of(parts):
            # No room for a copy: training waits, and the tensors are written one by one.
            self.publish(folder, parts)
            return
        self.writer = self.writer or ThreadPoolExecutor(1, "checkpoint")
        self.pending = self.writer.submit(self.publish, folder, snapshot(parts))

    def publish(self, folder: Path, parts: tuple) -> None:
        for attempt in (1, 2):
            try:
                write_checkpoint(folder, *parts, self.config)
            except StorageError as error:
                self.failure = error
                if attempt == 1:
                    time.sleep(RETRY_AFTER)
                continue
            self.failure = None
            self.failures = 0
            for old in published(CheckpointFolder(folder).run.path)[: -self.keep]:
                shutil.rmtree(old, ignore_errors=True)
            return
        self.failures += 1

    def settle(self) -> None:
        """Waits until the save under way has ended, well or not."""
        if self.pending is not None:
            pending = self.pending
            self.pending = None
            pending.result()

    def wait(self, last: bool = False) -> None:
        """The same. Raises StorageError where too many saves in a row have failed, and where the
        last one has.
        """
        self.settle()
        if self.failure is None:
            return
        if last or self.failures > self.max_failed_saves:
            raise self.failure
        self.report(
            f"{self.failure} Training goes on; {self.failures} of at most {self.max_failed_saves} "
            "saves in a row have failed."
        )
        self.failure = None

    def load_checkpoint(self, path, map_location=None, weights_only=None) -> dict:
        folder = Path(path)
        reason = damage(folder)
        if reason:
            raise StorageError(f"The checkpoint {folder} is not whole: {reason}", key="resume")
        state = read_trainer(folder)
        state["state_dict"] = read_weights(folder, "model")
        average = read_weights(folder, "ema")
        bad = not_finite(state["state_dict"]) or not_finite(average or {})
        if bad:
            raise DivergedError(
                f"{bad} in the checkpoint {folder} is not finite",
                key="resume",
                remedy="Remove that folder to go on from the one before it, or start anew.",
            )
        if average is not None:
            state["callbacks"][EMA] = {"steps": state.pop("ema_steps"), "weights": average}
        return state

    def remove_checkpoint(self, path) -> None:
        shutil.rmtree(path, ignore_errors=True)


def split_checkpoint(
    checkpoint: dict,
) -> tuple[dict[str, Tensor], dict[str, Tensor] | None, dict]:
    """(weights, averaged weights or None, all other state) of Lightning's dictionary, which stays
    as it is.
    """
    state = dict(checkpoint)
    weights = state.pop("state_dict")
    callbacks = dict(state["callbacks"])
    average = callbacks.pop(EMA, None)
    state["callbacks"] = callbacks
    if average is None:
        return weights, None, state
    state["ema_steps"] = average["steps"]
    return weights, average["weights"], state
