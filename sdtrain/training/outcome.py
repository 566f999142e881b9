"""How a run ended: in status.json, in error.log with the traceback, and as one paragraph with an
exit code.
"""

import os
import re
import resource
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from sdtrain.config.boundary import as_user_error
from sdtrain.console import global_rank, report_failure, write_traceback
from sdtrain.errors import DataError, DivergedError, UserError
from sdtrain.redaction import redacted
from sdtrain.runs.layout import FIRST_STAGE, RunFolder
from sdtrain.runs.manifest import published
from sdtrain.runs.status import State, Status, write_status
from sdtrain.signals import INTERRUPTED, Interrupted, Signals
from sdtrain.training.child import typed_run_dir
from sdtrain.training.progress import Progress
from sdtrain.training.ranks import Ranks

LONGEST = 1000  # characters of a foreign error's message


class RunError(UserError):
    """An error that is nobody's mistake, with an exit code of its own: a bug, or a lost rank."""

    def __init__(self, problem: str, exit_code: int) -> None:
        super().__init__(problem)
        self.exit_code = exit_code


class Run:
    """A run that has begun: its folder and what is known of it while it goes on.

    owned: whether the folder's status and log are this process's to write; another run's are not,
    until this one goes on with it. has_begun: whether anything is trained: what is refused before
    leaves nothing behind. ranks: who watches the others, where there are several.
    """

    def __init__(self, folder: RunFolder, progress: Progress, console: Console) -> None:
        self.folder = folder
        self.progress = progress
        self.console = console
        self.signals = Signals()
        self.owned = not published(folder.path)
        self.has_begun = False
        self.ranks: Ranks | None = None

    def write_status(self, state: State, exit_code: int | None = None) -> None:
        """On rank 0, or on a rank whose rank 0 is dead; nothing before the run is "running"."""
        self.has_begun = self.has_begun or state == "running"
        if not self.has_begun:
            return
        speaks = global_rank() == 0 or self.is_orphaned
        if not speaks or not self.owned or not self.folder.path.is_dir():
            return
        command = shlex.join(redacted(["sdtrain", *sys.argv[1:]]))
        seen = self.progress.images_seen
        status = Status(state, os.getpid(), seen, exit_code, peak_memory_mb(), command)
        write_status(self.folder, status)

    def forget(self) -> None:
        """Takes back what was written of a run in which nothing was trained."""
        self.has_begun = False
        if global_rank() == 0 and self.owned:
            self.folder.status.unlink(missing_ok=True)
            self.folder.config.unlink(missing_ok=True)

    def take_over(self) -> None:
        """The folder's earlier run goes on in this process."""
        self.owned = True

    @property
    def is_orphaned(self) -> bool:
        return self.ranks is not None and self.ranks.orphaned

    def leave(self, exit_code: int, paragraph: str) -> None:
        """Ends the process from a thread, while the main one is stuck."""
        self.write_status("interrupted" if exit_code in INTERRUPTED else "failed", exit_code)
        message = " ".join(paragraph.split())
        log = write_traceback(self.folder.error_log(global_rank()), message)
        report_failure(message, log, aloud=global_rank() == 0 or self.is_orphaned)
        os._exit(exit_code)


@contextmanager
def outcome_recorded(run: Run) -> Iterator[None]:
    """Writes down how the run within ended, and raises Interrupted or a UserError for whatever
    ended it.
    """
    try:
        yield
    except Interrupted as stop:
        if stop.code:
            run.write_status("interrupted", stop.code)
            run.console.print(_interrupted(run), soft_wrap=True)
        raise
    except (UserError, OmegaConfBaseException) as error:
        mistake = _as_user_error(error)
        diverged = isinstance(mistake, DivergedError)
        run.write_status("diverged" if diverged else "failed", mistake.exit_code)
        # A folder that holds another run stays as it is, and so does one in which none has begun.
        is_ours = run.owned and run.has_begun
        log = run.folder.error_log(global_rank()) if global_rank() or is_ours else None
        _write_log(mistake, log)
        if mistake is error:
            raise
        raise mistake from error
    except Exception as error:
        failure = _as_run_error(error, run)
        interrupted = failure.exit_code in INTERRUPTED
        run.write_status("interrupted" if interrupted else "failed", failure.exit_code)
        failure.aloud = global_rank() == 0 or run.is_orphaned
        _write_log(failure, run.folder.error_log(global_rank()))
        raise failure from error
    finally:
        if run.ranks:
            run.ranks.finish()


def _interrupted(run: Run) -> str:
    """Where the run stands, and how to go on: a first stage goes on with the run that it is for."""
    folder = run.folder
    seen = run.progress.images_seen
    what = f"Interrupted at {seen} images"
    if folder.path.name == FIRST_STAGE:
        what = f"The first stage was interrupted at {seen} images"
        folder = RunFolder(folder.path.parent)
    elif not published(folder.path) and published(folder.first_stage.path):
        what = "Interrupted in the first stage"
    has_checkpoint = published(folder.path) or published(folder.first_stage.path)
    if run.progress.ended and has_checkpoint:
        saved = (
            "after the last step: the checkpoint is written, and the looks at the end that are "
            "missing are made later"
        )
    else:
        saved = "the checkpoint is written" if has_checkpoint else "before a checkpoint was written"
    word = typed_run_dir(folder)
    how = "Go on" if has_checkpoint else "Begin again"
    return f"{what}, {saved}. {how} with the same command with resume=auto {word}"


def _as_user_error(error: UserError | OmegaConfBaseException) -> UserError:
    if isinstance(error, OmegaConfBaseException):
        return as_user_error(error, list)
    if "DataLoader worker" in str(error):
        # A loader's worker hands its error on with its traceback before it.
        message = str(error).rpartition(f"{type(error).__name__}: ")[2]
        return type(error)(message)
    return error


def _as_run_error(error: Exception, run: Run) -> UserError:
    """For an error that is no mistake of the user's as it stands."""
    if re.search("DataLoader worker .*(killed by signal|exited unexpectedly)", str(error)):
        return DataError(
            f"A worker of the loader was killed at {run.progress.images_seen} images, "
            "perhaps because memory was short",
            key="data.num_workers",
            remedy="Lower data.num_workers, and go on with resume=auto "
            f"{typed_run_dir(run.folder)}.",
        )
    if "find_unused_parameters" in str(error):  # DDP's own advice
        return UserError(
            "Trained parameters of the model had no part in the loss of a step, and the ranks wait "
            "for their gradients",
            key="strategy.find_unused_parameters",
            remedy="Set strategy.find_unused_parameters=true, which looks for them in each step, "
            "or remove them from the model.",
        )
    code = 1
    message = f"{type(error).__name__}: {error}"
    if run.ranks:
        code, message = run.ranks.explain(error)
    return RunError(" ".join(message.split())[:LONGEST], code)


def _write_log(error: UserError, log: Path | None) -> None:
    """Writes the traceback to `log`, and its place onto the error: the command names it."""
    if log is not None:
        error.log = write_traceback(log, str(error))


def peak_memory_mb() -> int:
    """Of the device's allocations where there is one, else of this process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return round(torch.cuda.max_memory_allocated() / 2**20)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)
