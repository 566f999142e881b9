"""One run per folder: a lock that ends with its process, however that ends."""

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from sdtrain.errors import StorageError, UserError
from sdtrain.runs.layout import RunFolder


def _opened(path: Path) -> TextIO:
    """The locked file at `path`. A holder that leaves removes its file: what was opened before that is no longer the one with the name."""
    while True:
        file = open(path, "a+", encoding="utf-8")
        try:
            fcntl.lockf(
                file, fcntl.LOCK_EX | fcntl.LOCK_NB
            )  # POSIX: not inherited by a loader's workers
            if path.exists() and os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                return file
        except OSError as error:
            file.seek(0)
            error.holder = file.read().strip()
            file.close()
            raise
        file.close()


def left_behind(folder: Path) -> bool:
    """Whether a process held the folder's lock, and has gone without a word."""
    with contextlib.suppress(OSError), open(RunFolder(folder).lock, "r+", encoding="utf-8") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


@contextlib.contextmanager
def only_run(
    folder: Path, report: Callable[[str], None], key: str = "hydra.run.dir"
) -> Iterator[None]:
    """Holds the lock of a run's folder, or a sweep's. Raises UserError where another process has it, which it names; a dead run's lock is free.

    report takes a line for the user where the file system has no locks: then nothing is held.
    """
    path, file = RunFolder(folder).lock, None
    try:
        file = _opened(path)
        file.truncate(0)
        file.write(
            f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
        )
        file.flush()
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN) and hasattr(error, "holder"):
            who = error.holder or "another process"
            raise UserError(
                f"{folder} belongs to a run that is under way ({who}). Choose another {key}, or wait until it has ended."
            ) from None
        if file is not None or not hasattr(error, "holder"):
            raise StorageError(
                f"{folder} cannot be written: {error.strerror}. Set {key} to another folder."
            ) from error
        report(
            f"The file system of {folder} has no locks ({error.strerror}): take care that no second run is started in it."
        )
        path.unlink(missing_ok=True)
    try:
        yield
    finally:
        if file is not None:
            path.unlink(missing_ok=True)  # before it is free
            file.close()
