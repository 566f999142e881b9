"""Watches the data loader: ends the run if a batch takes too long, or if a signal arrives while the
run waits for one.
"""

import multiprocessing
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import util
from os import fsencode

from sdtrain.errors import DataError, UserError
from sdtrain.signals import Signals, exit_code_of
from sdtrain.training.progress import Progress

GRACE = 5.0
"""Seconds to wait for a batch after a signal. If one comes, a checkpoint is written as usual."""

MAX_SOCKET_PATH = 107
"""Largest length in bytes of the path of a Unix socket."""
WORKER_SOCKET = "/pymp-xxxxxxxx/listener-xxxxxxxx"
"""A loader worker's socket, below the folder for temporary files."""
SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")


class InputWatch:
    """Ends the run if no batch comes for `timeout` seconds, or for GRACE seconds after a signal.

    A thread watches, because the main thread is the one that waits.

    Args:
        timeout: seconds.
        signals: the signals that this process has received; None to ignore them here.
        progress: progress of the run.
        end_process: takes (exit code, paragraph), reports the error and ends this process.
    """

    def __init__(
        self,
        *,
        timeout: float,
        signals: Signals | None,
        progress: Progress,
        end_process: Callable[[int, str], None],
    ) -> None:
        self.timeout = timeout
        self.signals = signals
        self.progress = progress
        self.end_process = end_process
        self.waiting_since: float | None = None
        self.ending = threading.Event()
        self.thread: threading.Thread | None = None

    def watched(self, load: Callable[[], Iterator]) -> Iterator:
        """Yield the batches of load(), and watch while waiting for each of them."""
        if self.thread is None:
            self.thread = threading.Thread(target=self._watch, name="input", daemon=True)
            self.thread.start()
        iterator = None
        while True:
            self.waiting_since = time.monotonic()
            try:
                if iterator is None:
                    iterator = load()
                batch = next(iterator)
            except StopIteration:
                return
            finally:
                self.waiting_since = None
            yield batch

    def finish(self) -> None:
        """Stop watching and kill the loader workers; call it when the run has ended.

        Python would wait for a worker that is stuck, and workers ignore signals.
        """
        self.ending.set()
        _kill_workers()

    def _watch(self) -> None:
        signal_noticed_at = None
        while not self.ending.wait(min(0.2, self.timeout / 10)):
            now = time.monotonic()
            if signal_noticed_at is None and self.signals is not None and self.signals.received:
                signal_noticed_at = now
            since = self.waiting_since
            if since is None:
                continue
            if signal_noticed_at is not None and now - max(since, signal_noticed_at) > GRACE:
                self._end_run(exit_code_of(self.signals.received), self._explain_signal())
            elif now - since > self.timeout:
                self._end_run(DataError.exit_code, self._explain_wait())

    def _explain_signal(self) -> str:
        return (
            f"Interrupted at {self.progress.images_seen} images, while waiting for a batch from "
            "the data loader: no new checkpoint was written. Resume with resume=auto."
        )

    def _explain_wait(self) -> str:
        error = DataError(
            f"The data loader has returned no batch for {self.timeout:g} s, at "
            f"{self.progress.images_seen} images: {_describe_loader()}",
            key="data.timeout",
            remedy="Check that the pictures can be read; if reading them can take that long, "
            "raise data.timeout.",
        )
        return str(error)

    def _end_run(self, code: int, paragraph: str) -> None:
        _kill_workers()
        self.end_process(code, paragraph)


def _kill_workers() -> None:
    for worker in multiprocessing.active_children():
        worker.kill()


def _describe_loader() -> str:
    """Say what the processes that should load a batch are doing: the workers, or else this one."""
    workers = multiprocessing.active_children()
    if workers:
        pids = ", ".join(str(worker.pid) for worker in workers)
        return f"its workers are alive but return nothing (process {pids})"
    frame = sys._current_frames()[threading.main_thread().ident]
    innermost = traceback.extract_stack(frame)[-1]
    return f"the process is at {innermost.filename} line {innermost.lineno}, in {innermost.name}"


def use_short_socket_folder() -> None:
    """Let the loader workers put their sockets into a folder with a short path, if TMPDIR is too
    long for the path of a socket.

    Raises UserError if no such folder can be used.
    """
    folder = tempfile.gettempdir()
    if len(fsencode(folder + WORKER_SOCKET)) <= MAX_SOCKET_PATH:
        return
    usual = tempfile.tempdir
    for short in SHORT_FOLDERS:
        tempfile.tempdir = short
        try:
            util.get_temp_dir()  # created once per process, whose workers use it too
            return
        except OSError:
            continue
        finally:
            tempfile.tempdir = usual
    raise UserError(
        f"TMPDIR={folder} is too long for the sockets of the data loader's workers",
        key="data.num_workers",
        remedy="Set TMPDIR to a folder with a path of at most "
        f"{MAX_SOCKET_PATH - len(WORKER_SOCKET)} characters, or set data.num_workers=0.",
    )
