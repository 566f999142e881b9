"""What a command prints: lines that only rank 0 prints, streams that may break, and the paragraph
it fails with.
"""

import contextlib
import os
import sys
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NoReturn, TextIO

from sdtrain.files import write_text
from sdtrain.redaction import redacted

_ranks = [0]
"""The rank of this process among those of its run; of a process that is alone, 0."""


def take_rank(rank: int) -> None:
    """Says which rank this process is: only rank 0 prints."""
    _ranks[:] = [rank]


def global_rank() -> int:
    """This process's rank, as its command has found it; 0 where there is one process."""
    return _ranks[0]


def warn(line: str) -> None:
    """Prints a non-fatal warning, on rank 0's stderr."""
    if global_rank() == 0:
        print(f"sdtrain: {line}", file=sys.stderr, flush=True)


def write_traceback(log: Path, message: str) -> Path | None:
    """Writes `message` and the traceback of the exception that is being handled. Returns the file,
    None where it cannot be written.
    """
    trace = traceback.format_exc() if sys.exc_info()[0] else ""
    if not os.access(log.parent, os.W_OK):
        return None
    try:
        write_text(log, redacted(f"{message}\n\n{trace}"))
    except OSError:  # a full disk has no room for this either
        return None
    return log


def report_failure(message: str, log: Path | None = None, *, aloud: bool | None = None) -> None:
    """Prints the paragraph a command fails with, and names the file with its traceback.

    aloud: whether this process prints it; None leaves it to rank 0.
    """
    if global_rank() == 0 if aloud is None else aloud:
        where = f" Traceback: {log}" if log else ""
        print(redacted(f"sdtrain: {message}{where}"), file=sys.stderr, flush=True)


def fail(
    exit_code: int, message: str, log: Path | None = None, *, aloud: bool | None = None
) -> NoReturn:
    """Prints the paragraph, and leaves with the exit code."""
    report_failure(message, log, aloud=aloud)
    sys.exit(exit_code)


STREAMS = ("stdin", "stdout", "stderr")
"""By their descriptors."""


def secure_streams() -> None:
    """Makes stdout and stderr of this process ones that end no command. To be called first.

    A descriptor that is closed leads nowhere from now on: else the next file that is opened would
    get its number, and what a child process prints.
    """
    for number, name in enumerate(STREAMS):
        if getattr(sys, name) is None:
            setattr(sys, name, _opened_on_nothing(number))
    for name in STREAMS[1:]:
        stream = getattr(sys, name)
        if not isinstance(stream, UnbreakableStream):
            setattr(sys, name, UnbreakableStream(stream, name))


def _opened_on_nothing(number: int) -> TextIO:
    nowhere = os.open(os.devnull, os.O_RDWR)
    try:
        os.fstat(number)  # a file has it by now
    except OSError:
        os.dup2(nowhere, number)
    if nowhere > number:
        os.close(nowhere)
        nowhere = number
    os.set_inheritable(nowhere, True)
    return open(nowhere, "w" if number else "r", encoding="utf-8", closefd=False)


class UnbreakableStream:
    """stdout or stderr that may break without ending the command.

    A reader that has left, or a full disk, is reported once on stderr. Letters that its encoding
    lacks are written as escapes.
    """

    def __init__(self, stream: TextIO, name: str) -> None:
        self.stream = stream
        self.name = name

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with self._surviving():
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
        with self._surviving():
            self.stream.flush()

    @contextlib.contextmanager
    def _surviving(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # Also for what its buffer still holds, and for the interpreter's last flush.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)
            if self.name == "stdout":
                warn(f"stdout cannot be written ({error.strerror}); it goes on without it.")
