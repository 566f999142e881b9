"""Saves Lightning's checkpoint dictionary as sdtrain's checkpoint folder, in a thread, and loads
it.
"""

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
    find_non_finite,
    read_trainer,
    read_weights,
    snapshot,
    tensor_bytes,
    write_checkpoint,
)
from sdtrain.runs.layout import CheckpointFolder
from sdtrain.runs.manifest import find_damage, list_checkpoints

RETRY_AFTER = 1.0
"""Seconds between the two attempts of a save."""
EMA = "ema"
"""Key of the average's state among the states of the callbacks."""


def memory_available() -> float:
    """Return how many bytes can be allocated without swapping and within a container's limit; inf
    if the system does not tell.
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
    """Saves checkpoints in the background: training waits only for a copy in memory, which a thread
    writes.

    A save that fails is tried once more; if it fails again, the user is warned and training
    continues, until more than max_failed_saves in a row have failed. When a checkpoint is complete,
    all but the newest `keep` are removed.

    Args:
        config: the run's yaml.
        keep: number of checkpoints to keep.
        max_failed_saves: how many saves in a row may fail.
        warn: prints a warning.
        memory: returns the available memory in bytes.
    """

    def __init__(
        self,
        *,
        config: str,
        keep: int,
        max_failed_saves: int,
        warn: Callable[[str], None],
        memory: Callable[[], float] = memory_available,
    ) -> None:
        self.config = config
        self.keep = keep
        self.max_failed_saves = max_failed_saves
        self.warn = warn
        self.memory = memory
        self.writer: ThreadPoolExecutor | None = None
        self.pending: Future | None = None
        self.failure: StorageError | None = None
        self.failures = 0

    def save_checkpoint(self, checkpoint: dict, path, storage_options=None) -> None:
        self.wait()
        folder = Path(path)
        weights, average, state = split_checkpoint(checkpoint)
        bad = find_non_finite(weights) or find_non_finite(average or {})
        if bad:
            raise DivergedError(
                f"{bad} is not finite at {folder.name} images: it is not saved",
                key="optimizer.lr",
                remedy="Lower optimizer.lr, or check the data.",
            )
        parts = (weights, average, state)
        if self.memory() < 2 * tensor_bytes(parts):
            # Not enough memory for a copy: training waits while the tensors are written.
            self.publish(folder, parts)
            return
        if self.writer is None:
            self.writer = ThreadPoolExecutor(1, "checkpoint")
        self.pending = self.writer.submit(self.publish, folder, snapshot(parts))

    def publish(self, folder: Path, parts: tuple) -> None:
        """Write the checkpoint, twice if the first attempt fails, and remove older ones.

        A failure is kept in self.failure for `wait` to report.
        """
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
            for old in list_checkpoints(CheckpointFolder(folder).run.path)[: -self.keep]:
                shutil.rmtree(old, ignore_errors=True)
            return
        self.failures += 1

    def settle(self) -> None:
        """Wait until the current save has ended, successfully or not."""
        if self.pending is not None:
            pending = self.pending
            self.pending = None
            pending.result()

    def wait(self, last: bool = False) -> None:
        """Wait for the current save, and warn if it failed.

        Raises StorageError instead if too many saves in a row have failed, or if it failed and
        `last` says that there will be no further one.
        """
        self.settle()
        if self.failure is None:
            return
        if last or self.failures > self.max_failed_saves:
            raise self.failure
        self.warn(
            f"{self.failure} Training continues; failed saves in a row: {self.failures} of at "
            f"most {self.max_failed_saves}."
        )
        self.failure = None

    def load_checkpoint(self, path, map_location=None, weights_only=None) -> dict:
        folder = Path(path)
        reason = find_damage(folder)
        if reason:
            raise StorageError(f"The checkpoint {folder} is not whole: {reason}", key="resume")
        for name in ("model", "ema"):
            # Read a second time below: the file is mapped, and what has been looked at takes memory
            # until it is released.
            bad = find_non_finite(read_weights(folder, name) or {})
            if bad:
                raise DivergedError(
                    f"{bad} in the checkpoint {folder} is not finite",
                    key="resume",
                    remedy="Remove that folder to resume from the checkpoint before it, or start a "
                    "new run.",
                )
        state = read_trainer(folder)
        state["state_dict"] = read_weights(folder, "model")
        average = read_weights(folder, "ema")
        if average is not None:
            state["callbacks"][EMA] = {"steps": state.pop("ema_steps"), "weights": average}
        return state

    def remove_checkpoint(self, path) -> None:
        shutil.rmtree(path, ignore_errors=True)


def split_checkpoint(
    checkpoint: dict,
) -> tuple[dict[str, Tensor], dict[str, Tensor] | None, dict]:
    """Split Lightning's dictionary into (weights, averaged weights or None, all other state),
    without changing it.
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
