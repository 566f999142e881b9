"""Whether the loader gives batches: a run that waits for one too long is ended, and one that is
asked to leave meanwhile leaves.
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
"""Seconds in which a batch may still come after a signal: then a checkpoint is written as ever."""

LONGEST_SOCKET = 107  # bytes of the path of a Unix socket
SOCKET_OF_A_WORKER = "/pymp-xxxxxxxx/listener-xxxxxxxx"  # below the folder for temporary files
SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")


class InputWatch:
    """Ends the run where no batch comes for `timeout` seconds, or for a moment after a signal.

    A thread watches, because the main one is what waits.

    Args:
        timeout: seconds.
        signals: what this process has received; None where others decide on them.
        progress: where the run stands.
        leave: (exit code, paragraph), reports it and ends this process.
    """

    def __init__(
        self,
        *,
        timeout: float,
        signals: Signals | None,
        progress: Progress,
        leave: Callable[[int, str], None],
    ) -> None:
        self.timeout = timeout
        self.signals = signals
        self.progress = progress
        self.leave = leave
        self.waiting_since: float | None = None
        self.ending = threading.Event()
        self.thread: threading.Thread | None = None

    def watched(self, load: Callable[[], Iterator]) -> Iterator:
        """The batches of load(), each of which is watched until it has come."""
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
        """To be called when the run has ended. A loader's process that is stuck by then is killed:
        it ignores signals, and Python waits for its children before it leaves.
        """
        self.ending.set()
        _kill_workers()

    def _watch(self) -> None:
        signalled = None  # when a signal was noticed
        while not self.ending.wait(min(0.2, self.timeout / 10)):
            now = time.monotonic()
            if signalled is None and self.signals is not None and self.signals.received:
                signalled = now
            since = self.waiting_since
            if since is None:
                continue
            if signalled is not None and now - max(since, signalled) > GRACE:
                self._end_run(exit_code_of(self.signals.received), self._explain_signal())
            elif now - since > self.timeout:
                self._end_run(DataError.exit_code, self._explain_wait())

    def _explain_signal(self) -> str:
        return (
            f"Interrupted at {self.progress.images_seen} images, while the loader gave no batch of "
            "pictures: the last checkpoint is the newest one. Go on with resume=auto."
        )

    def _explain_wait(self) -> str:
        error = DataError(
            f"No batch of pictures has come for {self.timeout:g} s, at "
            f"{self.progress.images_seen} images: {_where_it_stands()}",
            key="data.timeout",
            remedy="Look whether the pictures can be read; if reading them does take that long, "
            "raise data.timeout.",
        )
        return str(error)

    def _end_run(self, code: int, paragraph: str) -> None:
        _kill_workers()
        self.leave(code, paragraph)


def _kill_workers() -> None:
    for worker in multiprocessing.active_children():
        worker.kill()


def _where_it_stands() -> str:
    """What is known of those that should give a batch: the loader's processes, or this one."""
    workers = multiprocessing.active_children()
    if workers:
        numbers = ", ".join(str(worker.pid) for worker in workers)
        return f"the loader's processes live and give nothing (process {numbers})"
    frame = sys._current_frames()[threading.main_thread().ident]
    last = traceback.extract_stack(frame)[-1]
    return f"the process is at {last.filename} line {last.lineno}, in {last.name}"


def make_room_for_sockets() -> None:
    """Has the loader's processes meet in a folder of a short name, where TMPDIR is too long for the
    path of a socket.

    Raises UserError where there is none.
    """
    folder = tempfile.gettempdir()
    if len(fsencode(folder + SOCKET_OF_A_WORKER)) <= LONGEST_SOCKET:
        return
    usual = tempfile.tempdir
    for short in SHORT_FOLDERS:
        tempfile.tempdir = short
        try:
            util.get_temp_dir()  # made once in a process, which hands it on to its workers
            return
        except OSError:
            continue
        finally:
            tempfile.tempdir = usual
    raise UserError(
        f"TMPDIR={folder} is too long for the sockets by which the loader's processes meet",
        key="data.num_workers",
        remedy="Set TMPDIR to a folder with a path of at most "
        f"{LONGEST_SOCKET - len(SOCKET_OF_A_WORKER)} characters, or data.num_workers=0.",
    )
