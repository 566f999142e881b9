"""The signals on which a run or a sweep saves and exits."""

import atexit
import os
import signal

INTERRUPTED = (130, 143)
"""Exit codes of a process that saved and exited on a signal."""
INTERRUPTING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class Interrupted(SystemExit):
    """Raised after a signal, once the checkpoint is written.

    Ranks above 0 exit with code 0, because Lightning kills all ranks if one exits with another.
    """


class Signals:
    """Records the first SIGTERM, SIGINT, SIGUSR1 or SIGHUP, to be handled at the end of a step.

    A second SIGTERM, SIGINT or SIGHUP ends the process immediately.

    received: number of the signal, 0 before it.
    """

    def __init__(self) -> None:
        self.received = 0

    def install(self) -> None:
        """Handle the signals from now on, except a SIGHUP that nohup has disabled."""
        for number in INTERRUPTING:
            is_ignored = signal.getsignal(number) == signal.SIG_IGN
            if number == signal.SIGHUP and is_ignored:
                continue
            signal.signal(number, self)
        # Python restores the default handlers while it shuts down, when the exit code is decided.
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
    """Return the exit code for a signal: 130 for SIGINT (Ctrl-C), 143 for SIGTERM and for SIGUSR1,
    which job schedulers send as a warning before SIGTERM.
    """
    return 130 if number == signal.SIGINT else 143
