"""What a command prints: output on rank 0 only, streams that may break, and error messages."""

import contextlib
import os
import sys
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NoReturn, TextIO

from rich.console import Console

from sdtrain.files import write_text
from sdtrain.redaction import redacted

_rank = [0]
"""The rank of this process in its run; 0 if there is only one process."""


def set_rank(rank: int) -> None:
    """Set the rank of this process. Only rank 0 prints."""
    _rank[:] = [rank]


def global_rank() -> int:
    """Return the rank of this process as its command has set it; 0 if there is one process."""
    return _rank[0]


def warn(line: str) -> None:
    """Print a non-fatal warning on stderr, on rank 0."""
    if global_rank() == 0:
        print(f"sdtrain: {line}", file=sys.stderr, flush=True)


def make_console() -> Console:
    """Return the console on which a command prints its plan and progress, on rank 0."""
    return Console(
        markup=False,  # a path or a list in brackets is not markup
        highlight=False,
        quiet=global_rank() > 0,
        # A notebook's FORCE_COLOR asks for colours; rich would also draw a moving progress bar.
        force_terminal=sys.stdout.isatty(),
    )


def format_duration(seconds: float) -> str:
    """Return a text such as "about 21 min": hours from 1.5 hours, minutes from 1.5 minutes."""
    if seconds >= 5400:
        return f"about {seconds / 3600:.1f} hours"
    if seconds >= 90:
        return f"about {seconds / 60:.0f} min"
    return f"about {max(1, round(seconds))} s"


def write_traceback(log: Path, message: str) -> Path | None:
    """Write `message` and the traceback of the current exception to `log`.

    Returns the file, or None if it cannot be written.
    """
    trace = traceback.format_exc() if sys.exc_info()[0] else ""
    if not os.access(log.parent, os.W_OK):
        return None
    try:
        write_text(log, redacted(f"{message}\n\n{trace}"))
    except OSError:  # for example a full disk
        return None
    return log


def print_failure(
    message: str, log: Path | None = None, *, on_every_rank: bool | None = None
) -> None:
    """Print the paragraph with which a command fails, and the file that holds the traceback.

    on_every_rank: whether this process prints it, whatever its rank; None: only on rank 0.
    """
    if on_every_rank is None:
        on_every_rank = global_rank() == 0
    if on_every_rank:
        where = f" Traceback: {log}" if log else ""
        print(redacted(f"sdtrain: {message}{where}"), file=sys.stderr, flush=True)


def fail(
    exit_code: int, message: str, log: Path | None = None, *, on_every_rank: bool | None = None
) -> NoReturn:
    """Print `message` as `print_failure` does, with its other arguments, and exit."""
    print_failure(message, log, on_every_rank=on_every_rank)
    sys.exit(exit_code)


STREAMS = ("stdin", "stdout", "stderr")
"""By file descriptor."""


def secure_streams() -> None:
    """Make sure that no error on stdout or stderr ends this command. Call this first.

    A closed descriptor is opened on /dev/null. Otherwise the next file that is opened would get its
    number, and with it the output of child processes.
    """
    for descriptor, name in enumerate(STREAMS):
        if getattr(sys, name) is None:
            setattr(sys, name, _open_null(descriptor))
    for name in STREAMS[1:]:
        stream = getattr(sys, name)
        if not isinstance(stream, UnbreakableStream):
            setattr(sys, name, UnbreakableStream(stream, name))


def _open_null(descriptor: int) -> TextIO:
    """Open /dev/null as `descriptor`, or as another one if a file has taken that number by now."""
    null = os.open(os.devnull, os.O_RDWR)
    try:
        os.fstat(descriptor)  # succeeds if it is open
    except OSError:
        os.dup2(null, descriptor)
    if null > descriptor:
        os.close(null)
        null = descriptor
    os.set_inheritable(null, True)
    return open(null, "w" if descriptor else "r", encoding="utf-8", closefd=False)


class UnbreakableStream:
    """stdout or stderr that may break without ending the command.

    If its reader has exited or the disk is full, that is reported once on stderr. Characters that
    its encoding lacks are escaped.
    """

    def __init__(self, stream: TextIO, name: str) -> None:
        self.stream = stream
        self.name = name

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with self._switch_to_null_on_error():
            try:
                self.stream.write(text)
            except UnicodeEncodeError:
                encoding = self.stream.encoding
                self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with self._switch_to_null_on_error():
            self.stream.flush()

    @contextlib.contextmanager
    def _switch_to_null_on_error(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # Also lets the rest of the buffer, and the interpreter's last flush, go to /dev/null.
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.stream.fileno())
            os.close(null)
            if self.name == "stdout":
                warn(f"stdout cannot be written ({error.strerror}); the command continues.")
