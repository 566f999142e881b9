"""One run per folder: a lock that ends with its process, however that ends."""

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
from sdtrain.files import removed_if_empty, restore_replaced
from sdtrain.runs.layout import RunFolder


class _HeldError(Exception):
    """Another process has the lock. holder: the line it has left in the file."""

    def __init__(self, holder: str) -> None:
        super().__init__(holder)
        self.holder = holder


class FolderHeldError(UserError):
    """A run or a sweep is under way in the folder."""


class _NoLocksError(Exception):
    """The file could be opened, and its file system refuses to lock it."""


def left_behind(folder: Path) -> bool:
    """Whether a process held the folder's lock, and has ended without removing it."""
    with contextlib.suppress(OSError), open(RunFolder(folder).lock, "r+", encoding="utf-8") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


@contextlib.contextmanager
def only_run(
    folder: Path, report: Callable[[str], None], key: str = "hydra.run.dir"
) -> Iterator[None]:
    """Holds the lock of a run's folder, or a sweep's. A dead run's lock is free, and a checkpoint
    that it was about to replace has its name back.

    Raises FolderHeldError where another process has it, which it names; StorageError where the
    folder cannot be written.

    report: takes a line for the user where the file system has no locks: then nothing is held.
    key: where the folder is configured.
    """
    path = RunFolder(folder).lock
    file = None
    try:
        file = _opened(path)
        _sign(file)
        # Before anybody looks for the newest checkpoint.
        restore_replaced(RunFolder(folder).checkpoints)
    except _HeldError as error:
        who = error.holder or "another process"
        raise FolderHeldError(
            f"{folder} belongs to a run that is under way ({who})",
            key=key,
            remedy=f"Choose another {key}, or wait until it has ended.",
        ) from None
    except _NoLocksError as error:
        report(
            f"The file system of {folder} has no locks ({error}): take care that no second run is "
            "started in it."
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
            path.unlink(missing_ok=True)  # before it is free
            file.close()


def _opened(path: Path) -> TextIO:
    """The locked file at `path`.

    Raises _HeldError, _NoLocksError, or OSError where it cannot be opened.
    """
    while True:
        file = open(path, "a+", encoding="utf-8")
        try:
            # POSIX: not inherited by a loader's workers.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read().strip()
            file.close()
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise _HeldError(holder) from error
            raise _NoLocksError(error.strerror) from error
        # A holder that leaves removes its file: what was opened before that has lost its name.
        if _is_named(file, path):
            return file
        file.close()


def _is_named(file: TextIO, path: Path) -> bool:
    """Whether `path` still leads to the open file."""
    with contextlib.suppress(FileNotFoundError):
        return os.fstat(file.fileno()).st_ino == path.stat().st_ino
    return False


def _sign(file: TextIO) -> None:
    """Says whose lock it is."""
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}\n")
    file.flush()


@contextlib.contextmanager
def alone_in(folder: Path, *, is_of_this_moment: bool) -> Iterator[RunFolder]:
    """Holds the lock of a run's folder on rank 0, for all ranks of the run.

    is_of_this_moment: see `hold_folder`.
    """
    with contextlib.ExitStack() as held:
        if global_rank() == 0:
            folder = hold_folder(held, folder, is_of_this_moment=is_of_this_moment)
        yield RunFolder(folder)


def hold_folder(
    held: contextlib.ExitStack, folder: Path, *, is_of_this_moment: bool, key: str = "hydra.run.dir"
) -> Path:
    """Holds the lock of a folder until `held` ends, and returns the folder. Raises as `only_run`
    does.

    is_of_this_moment: whether its name is the time, so that what lies there has begun in the same
    second: then it is one beside it, with -2 at the end, or -3. Nothing is left of that where
    nothing is written into it.
    """
    if not is_of_this_moment:
        held.enter_context(only_run(folder, print, key))
        return folder
    for number in itertools.count(1):
        place = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        place.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as trial, contextlib.suppress(FolderHeldError):
            trial.enter_context(removed_if_empty([place] if number > 1 else []))
            trial.enter_context(only_run(place, print, key))
            if all(path == RunFolder(place).lock for path in place.iterdir()):
                held.push(trial.pop_all())
                break
    return place
