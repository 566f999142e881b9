"""Starts a run in a child process: the first stage, or an arm of a sweep."""

import contextlib
import ctypes
import os
import shlex
import signal
import sys
from collections.abc import Iterable

from sdtrain.config.overrides import quoted, text_override
from sdtrain.errors import UserError
from sdtrain.paths import PACKAGE
from sdtrain.runs.layout import RunFolder
from sdtrain.runs.resume import arm_digest
from sdtrain.training.loggers.wandb_variables import forget_wandb_run

CHECKED = "SDTRAIN_CHECKED"
"""Environment variable with the digest of the configuration that a sweep has checked for an arm:
see runs/resume.py."""

SCRIPT = PACKAGE / "commands" / "process" / "train.py"
"""A script in a folder of its own: Python puts that folder on its search path and not the working
directory, as for an installed command."""


def train_command(words: Iterable[str], run: RunFolder) -> list[str]:
    """Return the sdtrain command that starts a run in the folder `run`, or resumes the run in it.

    words: command-line arguments of sdtrain.
    """
    return [sys.executable, str(SCRIPT), *words, "resume=auto", run_dir_override(run)]


def this_command() -> list[str]:
    """Return the command that starts this process's command once more, without its arguments."""
    main = sys.modules["__main__"]
    module = main.__spec__.name if main.__spec__ else ""
    if module and not module.startswith("sdtrain."):
        return [sys.executable, "-m", module]
    is_script = not module and os.path.isfile(sys.argv[0])
    return [sys.executable, os.path.abspath(sys.argv[0]) if is_script else str(SCRIPT)]


def run_dir_override(run: RunFolder) -> str:
    """Return the Hydra override that sets the run's folder, with special characters quoted."""
    return f"hydra.run.dir={quoted(str(run.path))}"


def run_dir_for_shell(run: RunFolder) -> str:
    """Return the override that sets the run's folder, quoted for a shell."""
    return shlex.quote(text_override("hydra.run.dir", str(run.path)))


def check_arm_digest(config: dict) -> None:
    """Raise UserError if this process is an arm of a sweep and its configuration is not the one
    that the sweep has checked.
    """
    # Removed from the environment, so that a first stage, which is not an arm, does not inherit it.
    checked = os.environ.pop(CHECKED, None)
    if checked is not None and checked != arm_digest(config):
        raise UserError(
            "The configuration of this arm differs from the one that its sweep has checked",
            key="hydra.launcher.prefix",
            remedy="Make sure that both see the same configuration files and the same sdtrain, "
            "and the same environment variables if a configuration reads any.",
        )


def child_environment(name: str) -> dict[str, str]:
    """Return a copy of this process's environment without the variables that select a wandb run.

    name: the child's, which is added to WANDB_NAME.
    """
    environment = dict(os.environ)
    forget_wandb_run(environment, name)
    return environment


def stop_with_parent() -> None:
    """Ask the kernel to signal this process when its parent dies, so that it saves and exits.

    Pass it as `preexec_fn` of the child; works on Linux only. The signal is SIGUSR1: if the parent
    has several threads, the kernel sends a signal as each of them ends, and a second SIGTERM would
    kill the child before it has saved.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGUSR1)  # PR_SET_PDEATHSIG
