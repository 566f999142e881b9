"""One paragraph and an exit code for whatever goes wrong."""

import contextlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn, TextIO

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from sdtrain.config.check import nearest
from sdtrain.paths import error_log
from sdtrain.redaction import redacted


def global_rank() -> int:
    return int(
        os.environ.get("RANK", os.environ.get("LOCAL_RANK", os.environ.get("SLURM_PROCID", 0)))
    )


class Unbroken:
    """stdout, until it breaks: a reader that has left, or a full disk behind it, is said once on stderr, and does not end the run."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with self.surviving():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self.surviving():
            self.stream.flush()

    @contextlib.contextmanager
    def surviving(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(
                nowhere, self.stream.fileno()
            )  # also for what its buffer still holds, and for the interpreter's last flush
            os.close(nowhere)
            print(
                f"sdtrain: stdout cannot be written ({error.strerror}); the run goes on without it.",
                file=sys.stderr,
                flush=True,
            )


def say(message: str, run_dir: Path | None = None, *, aloud: bool | None = None) -> None:
    """Prints it, on rank 0 if not told otherwise, and keeps it with the traceback in the run's error.log, other ranks in theirs."""
    where = ""
    if run_dir is not None and run_dir.is_dir() and os.access(run_dir, os.W_OK):
        log = error_log(run_dir, global_rank())
        with contextlib.suppress(OSError):  # a full disk has no room for this either
            log.write_text(
                redacted(f"{message}\n\n{traceback.format_exc() if sys.exc_info()[0] else ''}"),
                encoding="utf-8",
            )
            where = f" Traceback: {log}"
    if global_rank() == 0 if aloud is None else aloud:
        print(redacted(f"sdtrain: {message}{where}"), file=sys.stderr, flush=True)


def fail(
    code: int, message: str, run_dir: Path | None = None, *, aloud: bool | None = None
) -> NoReturn:
    """Says it, and leaves."""
    say(message, run_dir, aloud=aloud)
    sys.exit(code)


def paragraph(error: Exception, known_keys: Callable[[], list[str]]) -> str:
    """A Hydra or OmegaConf error in a sentence or two, with the nearest key that exists."""
    text = str(error)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return f"{group}={name}: there is no configs/{group}/{name}.yaml.{nearest(name, error.options or [])}"
    if isinstance(error, OverrideParseException):
        how = "Write key=value, and put values with spaces, commas or brackets in quotes: 'key=\"value\"'."
        return f"'{error.override}' cannot be read: {text.splitlines()[0]}. {how}"
    if match := re.search(r"An item is already at '([^']+)'", text):
        return f"'{match[1]}' is there already: write {match[1]}=... without a +."
    if match := re.match(r"Could not (?:override|append|delete)[^']*'([^']+)'", text):
        key = match[1].rstrip(".").partition("@")[0]
        known = known_keys()
        if key in known:
            return f"There is no key '{key}' here: an option that was chosen leaves it out. Remove {key}, or choose another option."
        return f"There is no key '{key}'.{nearest(key, known)}"
    if isinstance(error, PermissionError | FileNotFoundError | NotADirectoryError | OSError):
        return f"{error.strerror}: {error.filename}."
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    key = getattr(cause, "full_key", None)
    return str(cause).splitlines()[0] + (f" (key {key})" if key else "")


FOREIGN = (HydraException, OmegaConfBaseException)
