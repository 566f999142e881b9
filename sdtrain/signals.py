"""The signals on which a run or a sweep saves and leaves."""

import atexit
import os
import signal

INTERRUPTED = (130, 143)
"""Exit codes of a process that has saved and left on a signal."""
INTERRUPTING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class Interrupted(SystemExit):
    """Raised after a signal, once the checkpoint is written. Ranks above 0 leave with code 0: if
    one does not, Lightning kills all of them.
    """


class Signals:
    """Remembers the first SIGTERM, SIGINT, SIGUSR1 or SIGHUP until a step ends.

    A second SIGTERM, SIGINT or SIGHUP ends the process at once.
    """

    def __init__(self) -> None:
        self.received = 0

    def install(self) -> None:
        for number in INTERRUPTING:
            ignored = signal.getsignal(number) == signal.SIG_IGN
            if number == signal.SIGHUP and ignored:  # nohup means it
                continue
            signal.signal(number, self)
        # While the interpreter ends: the exit code is decided, and Python would take its default.
        atexit.register(ignore_signals)

    def __call__(self, number: int, frame) -> None:
        if self.received and number != signal.SIGUSR1:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = self.received or number


def ignore_signals() -> None:
    for number in INTERRUPTING:
        signal.signal(number, signal.SIG_IGN)


def exit_code_of(number: int) -> int:
    """130 for Ctrl-C; 143 for a request to leave: SIGTERM, or the SIGUSR1 that schedulers send
    before it.
    """
    return 130 if number == signal.SIGINT else 143
