"""The lock of a run folder, so that only one run uses it. It ends with the process that holds it,
however the process ends.
"""

import contextlib
import errno
import fcntl
import itertools
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from sdtrain.console import global_rank
from sdtrain.errors import StorageError, UserError
from sdtrain.files import remove_if_empty, restore_replaced
from sdtrain.runs.layout import RunFolder


class _HeldError(Exception):
    """Another process holds the lock. holder: the line that it wrote into the file."""

    def __init__(self, holder: str) -> None:
        super().__init__(holder)
        self.holder = holder


class FolderHeldError(UserError):
    """A run or a sweep is running in the folder."""


class _NoLocksError(Exception):
    """The file could be opened, but its file system does not support locks."""


def has_stale_lock(folder: Path) -> bool:
    """Whether a process held the folder's lock and ended without removing the file."""
    with contextlib.suppress(OSError), open(RunFolder(folder).lock, "r+", encoding="utf-8") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


@contextlib.contextmanager
def hold_lock(
    folder: Path, warn: Callable[[str], None], key: str = "hydra.run.dir"
) -> Iterator[None]:
    """Hold the lock of the folder of a run or a sweep within the block.

    The lock of a dead process is free. If that process died while it replaced a checkpoint, the old
    checkpoint gets its name back.

    Raises FolderHeldError, which names the other process, if that holds the lock, and StorageError
    if the folder cannot be written.

    Args:
        folder: of the run or sweep.
        warn: prints a line; called if the file system has no locks, in which case none is held.
        key: the key that sets the folder.
    """
    path = RunFolder(folder).lock
    file = None
    try:
        file = _open_and_lock(path)
        _write_holder(file)
        # Before anything searches for the newest checkpoint.
        restore_replaced(RunFolder(folder).checkpoints)
    except _HeldError as error:
        holder = error.holder or "another process"
        raise FolderHeldError(
            f"A run is already running in {folder} ({holder})",
            key=key,
            remedy=f"Choose another {key}, or wait until that run has ended.",
        ) from None
    except _NoLocksError as error:
        warn(
            f"The file system of {folder} does not support locks ({error}): make sure that no "
            "second run is started in it."
        )
        path.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(
            f"{folder} cannot be written: {error.strerror}",
            key=key,
            remedy=f"Set {key} to another folder.",
        ) from error
    try:
        yield
    finally:
        if file is not None:
            path.unlink(missing_ok=True)  # before the lock is released
            file.close()


def _open_and_lock(path: Path) -> TextIO:
    """Open the file at `path` and lock it.

    Raises _HeldError or _NoLocksError, or OSError if the file cannot be opened.
    """
    while True:
        file = open(path, "a+", encoding="utf-8")
        try:
            # A POSIX lock, because the workers of a data loader do not inherit it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read().strip()
            file.close()
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise _HeldError(holder) from error
            raise _NoLocksError(error.strerror) from error
        # The previous holder may have removed the file after it was opened here. Then try again.
        if _is_same_file(file, path):
            return file
        file.close()


def _is_same_file(file: TextIO, path: Path) -> bool:
    """Whether `path` still names the open file."""
    with contextlib.suppress(FileNotFoundError):
        return os.fstat(file.fileno()).st_ino == path.stat().st_ino
    return False


def _write_holder(file: TextIO) -> None:
    """Write into the file which process holds the lock."""
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}\n")
    file.flush()


@contextlib.contextmanager
def hold_run_folder(folder: Path, *, has_timestamp: bool) -> Iterator[RunFolder]:
    """Hold the lock of a run's folder; rank 0 does so for all ranks of the run.

    has_timestamp: see `hold_folder`.
    """
    with contextlib.ExitStack() as stack:
        if global_rank() == 0:
            folder = hold_folder(stack, folder, has_timestamp=has_timestamp)
        yield RunFolder(folder)


def hold_folder(
    stack: contextlib.ExitStack, folder: Path, *, has_timestamp: bool, key: str = "hydra.run.dir"
) -> Path:
    """Hold the lock of a folder until `stack` is closed, and return the folder. Raises as
    `hold_lock` does.

    Args:
        stack: to which the lock is added.
        folder: of the run or sweep.
        has_timestamp: whether the folder is named by the time of the start. Two runs may start in
            the same second: if the folder is not empty, one named with -2 (or -3, ...) at the end
            is held instead. It is removed at the end if nothing was written into it.
        key: the key that sets the folder.
    """
    if not has_timestamp:
        stack.enter_context(hold_lock(folder, print, key))
        return folder
    for number in itertools.count(1):
        candidate = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        candidate.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as attempt, contextlib.suppress(FolderHeldError):
            attempt.enter_context(remove_if_empty([candidate] if number > 1 else []))
            attempt.enter_context(hold_lock(candidate, print, key))
            if all(path == RunFolder(candidate).lock for path in candidate.iterdir()):
                stack.push(attempt.pop_all())
                break
    return candidate
