"""The error boundary of all commands: whatever goes wrong is one paragraph and an exit code.

Imports neither torch nor Lightning, so that --help, completion and refusals are quick.
"""

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from sdtrain.config.check import nearest
from sdtrain.config.compose import known_keys
from sdtrain.config.launch import forget_empty
from sdtrain.config.overrides import GROUP_OF_KEY, prepared, repeated_choice, typed_values
from sdtrain.console import fail, secure_streams
from sdtrain.errors import StorageError, UserError
from sdtrain.paths import config_dir, search_working_directory_last

CONFIGURATION_ERRORS = (HydraException, OmegaConfBaseException)

PLACES = ("hydra.run.dir", "hydra.sweep.dir", "output")
"""Keys that say where a command writes."""


@contextmanager
def error_boundary(config_name: str, output_key: str = "output") -> Iterator[None]:
    """Leaves by SystemExit, after one paragraph on stderr, for every error that is not a bug.

    config_name: the yaml whose keys may be suggested. output_key: the key that says where the
    command writes.
    """
    try:
        search_working_directory_last()
        forget_empty()
        yield
    except CONFIGURATION_ERRORS as error:
        _leave(as_user_error(error, lambda: known_keys(config_name), sys.argv[1:]))
    except UserError as error:
        _leave(error)
    except OSError as error:
        problem = f"{error.strerror}: {error.filename}"
        remedy = f"Set {output_key} to another place."
        _leave(StorageError(problem, key=output_key, remedy=remedy))
    except KeyboardInterrupt:
        sys.exit(130)


def _leave(error: UserError) -> NoReturn:
    fail(error.exit_code, str(error), error.log, aloud=error.aloud)


def run_command(
    task: Callable[[DictConfig], None],
    config_name: str,
    *,
    output_key: str = "output",
    repeatable: str | None = None,
    more: Callable[[list[str]], list[str]] | None = None,
) -> None:
    """Runs a task on what the words of the command line compose, within the boundary.

    repeatable: a key that may be given several times. more: (words as Hydra reads them) ->
    overrides to add.
    """
    secure_streams()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing and leaving with 1

    @hydra.main(config_path=str(config_dir()), config_name=config_name, version_base="1.3")
    def app(cfg: DictConfig) -> None:
        with error_boundary(config_name, output_key):  # within: Hydra prints what a task raises
            task(cfg)

    typed = sys.argv[1:]
    with error_boundary(config_name, output_key):
        words = prepared(typed, repeatable)
        _check_places(words)
        refuse_repeated_choices(words)
        added = prepared(more(words)) if more else []
        sys.argv[1:] = words + added
        app()


def _check_places(words: list[str]) -> None:
    """Raises UserError where an empty word would make the working directory the place to write."""
    for word in words:
        key, _, value = word.partition("=")
        if key.lstrip("+") in PLACES and "=" in word and not value.strip("'\" "):
            raise UserError("is empty", key=key, value="", remedy="Give a folder.")


def refuse_repeated_choices(words: Iterable[str]) -> None:
    """UserError where an option stands twice in a list of choices: Hydra would take it once."""
    for word in words:
        key, name = repeated_choice(word)
        if name and (config_dir() / key).is_dir():
            raise UserError(
                f"{key} names {name} twice, and it would be taken once",
                key=key,
                remedy="Leave one out; what it does can be made stronger by its own keys.",
            )


def as_user_error(
    error: Exception, known: Callable[[], list[str]], words: Iterable[str] = ()
) -> UserError:
    """A Hydra or OmegaConf error as a UserError, with the nearest key that exists.

    known: gives the keys of the configuration, when they are needed. words: of the command line.
    """
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _missing_option(error)
    text = str(error)
    match = re.match(r"Ambiguous value for argument '(.+)'", text)
    if match:
        return _several_values(match[1])
    if isinstance(error, OverrideParseException):
        return UserError(
            f"'{error.override}' cannot be read: {text.splitlines()[0]}",
            key=error.override.partition("=")[0],
            remedy="Write key=value, and put values with spaces, commas or brackets in quotes: "
            "'key=\"value\"'.",
        )
    match = re.search(r"An item is already at '([^']+)'", text)
    if match:
        key = match[1]
        return UserError(
            f"'{key}' is there already", key=key, remedy=f"Write {key}=... without a +."
        )
    match = re.match(r"Could not (?:override|append|delete)[^']*'([^']+)'", text)
    if match:
        key = match[1].rstrip(".").partition("@")[0]
        return _not_everywhere(key, words) or _missing_key(key, known())
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    key = getattr(cause, "full_key", None)
    problem = str(cause).splitlines()[0]
    if isinstance(cause, MissingMandatoryValue):
        return UserError(problem, key=key, remedy=f"Set {key}=...")
    return UserError(problem + (f" (key {key})" if key else ""), key=key)


def _several_values(word: str) -> UserError:
    key, _, values = word.partition("=")
    return UserError(
        f"{word} names several values for one run",
        key=key,
        remedy="Choose one, start a run for each with -m, which sdtrain alone takes, or put a text "
        f"that holds commas in quotes: '{key}=\"{values}\"'.",
    )


def _missing_option(error: MissingConfigException) -> UserError:
    group, _, name = error.missing_cfg_file.rpartition("/")
    typed = {value: key for key, value in GROUP_OF_KEY.items()}.get(group, group)
    options = error.options or _shipped_options(group)
    problem = f"{typed}={name}: there is no configs/{group}/{name}.yaml.{nearest(name, options)}"
    return UserError(problem, key=typed)


def _not_everywhere(key: str, words: Iterable[str]) -> UserError | None:
    """For a key that one of several options of a group has and another lacks, in a sweep."""
    group = key.partition(".")[0]
    for name, values in typed_values(words).items():
        if name != group or "," not in values:
            continue
        for option in values.split(","):
            path = config_dir() / group / f"{option}.yaml"
            if path.is_file() and _has(path, key):
                return UserError(
                    f"{key} is not a key of every option of {group}={values}: {option} has it",
                    key=key,
                    remedy=f"Sweep over the others without it, and start {group}={option} by a "
                    f"command of its own with -m {group}={option} and the same hydra.sweep.dir.",
                )
    return None


def _has(path: Path, key: str) -> bool:
    """Whether the key, the group's name first, stands in an option's yaml."""
    node = OmegaConf.load(path)
    group, _, below = key.partition(".")
    return OmegaConf.select(node, below) is not None or below in node or key in node


def _missing_key(key: str, known: list[str]) -> UserError:
    if key in known:
        return UserError(
            f"There is no key '{key}' here: an option that was chosen leaves it out",
            key=key,
            remedy=f"Remove {key}, or choose another option.",
        )
    return UserError(f"There is no key '{key}'.{nearest(key, known)}", key=key)


def _shipped_options(group: str) -> list[str]:
    """Hydra does not tell the options of a group of which several may be chosen."""
    return [path.stem for path in (config_dir() / group).glob("*.yaml")]
