"""Records how a run ended: in status.json, in error.log with the traceback, and as one paragraph
with an exit code.
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
from sdtrain.console import global_rank, print_failure, write_traceback
from sdtrain.errors import DataError, DivergedError, UserError, first_line
from sdtrain.redaction import redacted
from sdtrain.runs.layout import FIRST_STAGE, RunFolder
from sdtrain.runs.manifest import list_checkpoints
from sdtrain.runs.status import State, Status, write_status
from sdtrain.signals import INTERRUPTED, Interrupted, Signals
from sdtrain.training.child import run_dir_for_shell
from sdtrain.training.progress import Progress
from sdtrain.training.ranks import Ranks

MAX_MESSAGE = 1000
"""Number of characters shown of the message of an error that is not sdtrain's own."""


class RunError(UserError):
    """An error that the user did not cause, with its own exit code: a bug, or a lost rank."""

    def __init__(self, problem: str, exit_code: int) -> None:
        super().__init__(problem)
        self.exit_code = exit_code


class Run:
    """A run in progress: its folder, its progress and its status.

    Attributes:
        owns_folder: whether this process may write the folder's status and log. It may not if the
            folder holds another run, until it resumes that run.
        has_begun: whether training has begun; a run that is refused before leaves no files.
        ranks: the callback that watches the other ranks, if there are several.
    """

    def __init__(self, folder: RunFolder, progress: Progress, console: Console) -> None:
        self.folder = folder
        self.progress = progress
        self.console = console
        self.signals = Signals()
        self.owns_folder = not list_checkpoints(folder.path)
        self.has_begun = False
        self.ranks: Ranks | None = None

    def write_status(self, state: State, exit_code: int | None = None) -> None:
        """Write status.json, on rank 0 or on a rank whose rank 0 is dead.

        Nothing is written before the state has been "running".
        """
        self.has_begun = self.has_begun or state == "running"
        if not self.has_begun:
            return
        if not self.reports_errors or not self.owns_folder or not self.folder.path.is_dir():
            return
        command = shlex.join(redacted(["sdtrain", *sys.argv[1:]]))
        seen = self.progress.images_seen
        status = Status(state, os.getpid(), seen, exit_code, peak_memory_mb(), command)
        write_status(self.folder, status)

    def discard(self) -> None:
        """Remove the status and the configuration of a run in which nothing was trained."""
        self.has_begun = False
        if global_rank() == 0 and self.owns_folder:
            self.folder.status.unlink(missing_ok=True)
            self.folder.config.unlink(missing_ok=True)

    def take_over(self) -> None:
        """Resume the folder's earlier run in this process, which owns the folder from now on."""
        self.owns_folder = True

    @property
    def reports_errors(self) -> bool:
        """Whether this process writes the run's status and prints errors: rank 0, or another rank
        if rank 0 is dead.
        """
        if global_rank() == 0:
            return True
        return self.ranks is not None and self.ranks.is_orphaned

    def end_process(self, exit_code: int, paragraph: str) -> None:
        """Record and print an error, and end the process from a thread while the main one hangs."""
        self.write_status("interrupted" if exit_code in INTERRUPTED else "failed", exit_code)
        message = " ".join(paragraph.split())
        log = write_traceback(self.folder.error_log(global_rank()), message)
        print_failure(message, log, on_every_rank=self.reports_errors)
        os._exit(exit_code)


@contextmanager
def outcome_recorded(run: Run) -> Iterator[None]:
    """Record how the run in the `with` block ended; raise Interrupted or a UserError for whatever
    ended it.
    """
    try:
        yield
    except Interrupted as stop:
        if stop.code:
            run.write_status("interrupted", stop.code)
            run.console.print(_interrupted_line(run), soft_wrap=True)
        raise
    except (UserError, OmegaConfBaseException) as error:
        user_error = _as_user_error(error)
        diverged = isinstance(user_error, DivergedError)
        run.write_status("diverged" if diverged else "failed", user_error.exit_code)
        # No log goes into a folder that holds another run, or in which no run has begun.
        if global_rank() or (run.owns_folder and run.has_begun):
            _write_log(user_error, run.folder.error_log(global_rank()))
        if user_error is error:
            raise
        raise user_error from error
    except Exception as error:
        failure = _as_run_error(error, run)
        interrupted = failure.exit_code in INTERRUPTED
        run.write_status("interrupted" if interrupted else "failed", failure.exit_code)
        failure.on_every_rank = run.reports_errors
        if run.has_begun or isinstance(failure, RunError):
            _write_log(failure, run.folder.error_log(global_rank()))
        raise failure from error
    finally:
        if run.ranks:
            run.ranks.finish()


def _interrupted_line(run: Run) -> str:
    """Say where the run was interrupted and how to resume it. A first stage is resumed by the
    command of the run that it belongs to.
    """
    folder = run.folder
    seen = run.progress.images_seen
    what = f"Interrupted at {seen} images"
    if folder.path.name == FIRST_STAGE:
        what = f"The first stage was interrupted at {seen} images"
        folder = RunFolder(folder.path.parent)
    elif not list_checkpoints(folder.path) and list_checkpoints(folder.first_stage.path):
        what = "Interrupted in the first stage"
    has_checkpoint = list_checkpoints(folder.path) or list_checkpoints(folder.first_stage.path)
    if not has_checkpoint:
        saved = "before a checkpoint was written"
    elif run.progress.ended:
        saved = (
            "after the last step: the checkpoint is written; resuming makes the missing samples "
            "and validations"
        )
    else:
        saved = "the checkpoint is written"
    how = "Resume" if has_checkpoint else "Start again"
    override = run_dir_for_shell(folder)
    return f"{what}, {saved}. {how} with the same command with resume=auto {override}"


@contextmanager
def user_error_of_worker() -> Iterator[None]:
    """Raise a UserError of a loader worker in the block without the worker's traceback."""
    try:
        yield
    except UserError as error:
        user_error = _as_user_error(error)
        if user_error is error:
            raise
        raise user_error from error


def _as_user_error(error: UserError | OmegaConfBaseException) -> UserError:
    """Return the error as a UserError, without the traceback that a loader worker puts into it."""
    if isinstance(error, OmegaConfBaseException):
        return as_user_error(error, list)
    if "DataLoader worker" in str(error):
        # The message holds the worker's traceback, and the worker's own message at its end.
        message = str(error).rpartition(f"{type(error).__name__}: ")[2]
        return type(error)(message)
    return error


def _as_run_error(error: Exception, run: Run) -> UserError:
    """Return the error to show for an exception that is not a UserError."""
    if re.search("DataLoader worker .*(killed by signal|exited unexpectedly)", str(error)):
        return DataError(
            f"A data loader worker was killed at {run.progress.images_seen} images, "
            "perhaps because memory ran out",
            key="data.num_workers",
            remedy="Lower data.num_workers, and resume with resume=auto "
            f"{run_dir_for_shell(run.folder)}.",
        )
    if "find_unused_parameters" in str(error):  # DDP's own advice
        return UserError(
            "Some trained parameters of the model did not contribute to the loss of a step, and "
            "the ranks wait for their gradients",
            key="strategy.find_unused_parameters",
            remedy="Set strategy.find_unused_parameters=true, which finds such parameters in each "
            "step, or remove them from the model.",
        )
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return UserError(
            f"Memory ran out at {run.progress.images_seen} images: {first_line(error)}",
            key="data.batch_size",
            remedy="Lower data.batch_size or raise trainer.accumulate; "
            "model.unet.gradient_checkpointing=true and a leaner optimizer take less, too.",
        )
    code = 1
    message = f"{type(error).__name__}: {error}"
    if run.ranks:
        code, message = run.ranks.explain(error)
    return RunError(" ".join(message.split())[:MAX_MESSAGE], code)


def _write_log(error: UserError, log: Path) -> None:
    """Write the traceback to `log`, and store the path on the error for the command to print."""
    error.log = write_traceback(log, str(error))


def peak_memory_mb() -> int:
    """Return the peak memory in MiB: allocated on the GPU if one is used, otherwise resident in
    this process.
    """
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return round(torch.cuda.max_memory_allocated() / 2**20)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)
