"""Hydra's flags on a command line. Each may be written in several ways; this reads all of them."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sdtrain.errors import UserError
from sdtrain.paths import expand_home

CONFIG_PATH = "--config-path"
CONFIG_NAME = "--config-name"
CONFIG_DIR = "--config-dir"
MULTIRUN = "--multirun"
RERUN = "--experimental-rerun"
INFO = "--info"

FLAGS_WITH_VALUE = {
    "--cfg": "-c",
    "--package": "-p",
    CONFIG_PATH: "-cp",
    CONFIG_NAME: "-cn",
    CONFIG_DIR: "-cd",
    RERUN: None,
}
FLAGS_WITHOUT_VALUE = {
    "--help": "-h",
    "--hydra-help": None,
    "--version": None,
    "--resolve": None,
    "--run": "-r",
    MULTIRUN: "-m",
    "--shell-completion": "-sc",
}
FLAGS_WITH_OPTIONAL_VALUE = {INFO: "-i"}
INFO_VALUES = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
SHORT_NAMES = FLAGS_WITH_VALUE | FLAGS_WITHOUT_VALUE | FLAGS_WITH_OPTIONAL_VALUE
"""Long name of each flag -> its short name, or None."""


@dataclass(frozen=True)
class Flag:
    """A flag on a command line.

    Args:
        name: its long name; a flag that Hydra does not have keeps the name that was typed.
        value: None if it has none.
    """

    name: str
    value: str | None = None

    @property
    def word(self) -> str:
        """The flag as a single argument that means the same in any working directory."""
        return self.name if self.value is None else f"{self.name}={self.value}"


def read_flags(arguments: Sequence[str]) -> tuple[list[Flag], list[str]]:
    """Split a command line into its flags and all other words."""
    flags = []
    words = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("-"):
            words.append(argument)
            continue
        name, equals, value = argument.partition("=")
        name = _long_name(name)
        if name not in SHORT_NAMES:
            flags.append(Flag(argument))
            continue
        if not equals:
            value = rest.pop(0) if _next_is_value(name, rest) else None
        if name in (CONFIG_PATH, CONFIG_DIR) and value:
            value = _absolute(value)
        flags.append(Flag(name, value))
    return flags, words


def flag_words(flags: Iterable[Flag]) -> list[str]:
    """Return each flag as a single argument."""
    return [flag.word for flag in flags]


def refuse_rerun(flags: Iterable[Flag]) -> None:
    """Raise UserError for --experimental-rerun, the one flag of Hydra that sdtrain lacks."""
    if any(flag.name == RERUN for flag in flags):
        raise UserError(
            f"{RERUN} reads a pickled configuration, and sdtrain unpickles nothing",
            key=RERUN,
            remedy="Resume a run with resume=auto hydra.run.dir=FOLDER.",
        )


def flag_value(flags: Iterable[Flag], name: str) -> str | None:
    """Return the last value of a flag, as argparse does; None if the flag is not there."""
    value = None
    for flag in flags:
        if flag.name == name:
            value = flag.value
    return value


def _long_name(typed: str) -> str:
    """Return the long name of a flag given by its short name or by an unambiguous prefix."""
    if typed in SHORT_NAMES:
        return typed
    for name, short in SHORT_NAMES.items():
        if typed == short:
            return name
    if not typed.startswith("--") or typed == "--":
        return typed
    candidates = [name for name in SHORT_NAMES if name.startswith(typed)]
    return candidates[0] if len(candidates) == 1 else typed


def _next_is_value(name: str, rest: Sequence[str]) -> bool:
    """Whether the word after a flag is its value."""
    if not rest or name in FLAGS_WITHOUT_VALUE:
        return False
    return name in FLAGS_WITH_VALUE or rest[0] in INFO_VALUES


def _absolute(folder: str) -> str:
    """Make a folder absolute, because another process may start in another one. URLs stay."""
    return folder if "://" in folder else os.path.abspath(expand_home(folder))
