"""A run in a process of its own that this one starts: the first stage, or an arm of a sweep."""

import contextlib
import ctypes
import os
import shlex
import signal
import sys
from collections.abc import Iterable

from sdtrain.config.overrides import quoted, text_word
from sdtrain.errors import UserError
from sdtrain.paths import PACKAGE
from sdtrain.runs.layout import RunFolder
from sdtrain.runs.resume import arm_digest
from sdtrain.training.loggers.wandb_variables import forget_wandb_run

CHECKED = "SDTRAIN_CHECKED"
"""The digest of what an arm is to train, in its environment: see runs/resume.py."""

SCRIPT = PACKAGE / "commands" / "process" / "train.py"
"""Python searches its folder first, and not the working directory, as for an installed command."""


def train_command(words: Iterable[str], run: RunFolder) -> list[str]:
    """The command that begins a run in that folder, or goes on with it."""
    return [sys.executable, str(SCRIPT), *words, "resume=auto", run_dir_word(run)]


def this_command() -> list[str]:
    """What starts this command once more, before its words."""
    main = sys.modules["__main__"]
    module = main.__spec__.name if main.__spec__ else ""
    if module and not module.startswith("sdtrain."):
        return [sys.executable, "-m", module]
    is_script = not module and os.path.isfile(sys.argv[0])
    return [sys.executable, os.path.abspath(sys.argv[0]) if is_script else str(SCRIPT)]


def run_dir_word(run: RunFolder) -> str:
    """The override that names a run's folder, whatever characters are in it."""
    return f"hydra.run.dir={quoted(str(run.path))}"


def typed_run_dir(run: RunFolder) -> str:
    """The same as a person types it in a shell."""
    return shlex.quote(text_word("hydra.run.dir", str(run.path)))


def refuse_another_configuration(config: dict) -> None:
    """Raises UserError where the sweep that has started this arm has checked another one."""
    checked = os.environ.pop(CHECKED, None)  # a first stage is none of its arms
    if checked is not None and checked != arm_digest(config):
        raise UserError(
            "This arm composes another configuration than its sweep has checked",
            key="hydra.launcher.prefix",
            remedy="Both must find the same files of configuration and the same sdtrain, and the "
            "same variables of the environment where a configuration reads them.",
        )


def child_environment(name: str) -> dict[str, str]:
    """This process's, without what says which run of wandb it writes. name: the child's."""
    environment = dict(os.environ)
    forget_wandb_run(environment, name)
    return environment


def stop_with_parent() -> None:
    """Ask the kernel to send this child a signal when its parent dies, so that it saves and leaves.

    For `preexec_fn`; Linux alone has it. The signal is SIGUSR1: where the parent had several
    threads, the kernel sends one as each of them ends, and a second SIGTERM would kill the child
    before it has saved.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGUSR1)  # PR_SET_PDEATHSIG
