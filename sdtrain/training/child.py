"""A run in a process of its own that this one starts: the first stage, or an arm of a sweep."""

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterable

from sdtrain.config.overrides import quoted
from sdtrain.runs.layout import RunFolder
from sdtrain.training.loggers.wandb_variables import forget_wandb_run


def train_command(words: Iterable[str], run: RunFolder) -> list[str]:
    """The command that begins a run in that folder, or goes on with it."""
    folder = f"hydra.run.dir={quoted(str(run.path))}"
    return [sys.executable, "-m", "sdtrain.commands.train", *words, "resume=auto", folder]


def child_environment(name: str) -> dict[str, str]:
    """This process's, without what says which run of wandb it writes. name: the child's."""
    environment = dict(os.environ)
    forget_wandb_run(environment, name)
    return environment


def stop_with_parent() -> None:
    """Run in a child: it gets SIGTERM, on which it saves, where its parent dies without a word.
    Linux alone has it.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
