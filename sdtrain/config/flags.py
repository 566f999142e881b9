"""Hydra's flags on a command line: each may be written in several ways, and has one meaning."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sdtrain.errors import UserError
from sdtrain.paths import expanded

CONFIG_PATH = "--config-path"
CONFIG_NAME = "--config-name"
CONFIG_DIR = "--config-dir"
MULTIRUN = "--multirun"
RERUN = "--experimental-rerun"
INFO = "--info"

TAKE_A_VALUE = {
    "--cfg": "-c",
    "--package": "-p",
    CONFIG_PATH: "-cp",
    CONFIG_NAME: "-cn",
    CONFIG_DIR: "-cd",
    RERUN: None,
}
TAKE_NONE = {
    "--help": "-h",
    "--hydra-help": None,
    "--version": None,
    "--resolve": None,
    "--run": "-r",
    MULTIRUN: "-m",
    "--shell-completion": "-sc",
}
MAY_TAKE_A_VALUE = {INFO: "-i"}
KINDS_OF_INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
SHORT = TAKE_A_VALUE | TAKE_NONE | MAY_TAKE_A_VALUE
"""Each flag's long name -> its short one, or None."""


@dataclass(frozen=True)
class Flag:
    """name: the long one; of a flag that Hydra does not know, as it was typed. value: None where it
    has none.
    """

    name: str
    value: str | None = None

    @property
    def word(self) -> str:
        """As one word of a command line, which means the same in any folder."""
        return self.name if self.value is None else f"{self.name}={self.value}"


def read_flags(arguments: Sequence[str]) -> tuple[list[Flag], list[str]]:
    """(the flags, all other words)."""
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
        if name not in SHORT:
            flags.append(Flag(argument))
            continue
        if not equals:
            value = rest.pop(0) if _takes_next(name, rest) else None
        flags.append(Flag(name, _lasting(name, value)))
    return flags, words


def refuse_rerun(flags: Iterable[Flag]) -> None:
    """Raises UserError for the flag of Hydra's that sdtrain does not follow."""
    if any(flag.name == RERUN for flag in flags):
        raise UserError(
            f"{RERUN} reads a pickled configuration, and sdtrain unpickles nothing",
            key=RERUN,
            remedy="Go on with a run by resume=auto hydra.run.dir=FOLDER.",
        )


def value_of(flags: Iterable[Flag], name: str) -> str | None:
    """What a flag was given last, as argparse has it; None where it was not given."""
    found = None
    for flag in flags:
        if flag.name == name:
            found = flag.value
    return found


def _long_name(typed: str) -> str:
    """A flag may be short, or cut to what no other begins with."""
    if typed in SHORT:
        return typed
    for name, short in SHORT.items():
        if typed == short:
            return name
    begun = [name for name in SHORT if typed.startswith("--") and name.startswith(typed)]
    return begun[0] if len(begun) == 1 and len(typed) > 2 else typed


def _takes_next(name: str, rest: Sequence[str]) -> bool:
    """Whether the word after a flag is its value."""
    if not rest or name in TAKE_NONE:
        return False
    return name in TAKE_A_VALUE or rest[0] in KINDS_OF_INFO


def _lasting(name: str, value: str | None) -> str | None:
    """A folder's whole path: another process may be started in another folder."""
    is_folder = name in (CONFIG_PATH, CONFIG_DIR) and value and "://" not in value
    return os.path.abspath(expanded(value)) if is_folder else value
