"""The error boundary of all commands: whatever goes wrong is one paragraph and an exit code.

Imports neither torch nor Lightning, so that --help, completion and refusals are quick.
"""

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import hydra
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from sdtrain.config.check import nearest
from sdtrain.config.compose import known_keys
from sdtrain.config.overrides import GROUP_OF_KEY, prepared
from sdtrain.console import fail, secure_streams
from sdtrain.errors import StorageError, UserError
from sdtrain.paths import config_dir

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
        yield
    except CONFIGURATION_ERRORS as error:
        _leave(as_user_error(error, lambda: known_keys(config_name)))
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
        added = prepared(more(words)) if more else []
        sys.argv[1:] = words + added
        app()


def _check_places(words: list[str]) -> None:
    """Raises UserError where an empty word would make the working directory the place to write."""
    for word in words:
        key, _, value = word.partition("=")
        if key.lstrip("+") in PLACES and "=" in word and not value.strip("'\" "):
            raise UserError("is empty", key=key, value="", remedy="Give a folder.")


def as_user_error(error: Exception, known: Callable[[], list[str]]) -> UserError:
    """A Hydra or OmegaConf error as a UserError, with the nearest key that exists.

    known: gives the keys of the configuration, when they are needed.
    """
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _missing_option(error)
    text = str(error)
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
        return _missing_key(match[1].rstrip(".").partition("@")[0], known())
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    key = getattr(cause, "full_key", None)
    problem = str(cause).splitlines()[0]
    if isinstance(cause, MissingMandatoryValue):
        return UserError(problem, key=key, remedy=f"Set {key}=...")
    return UserError(problem + (f" (key {key})" if key else ""), key=key)


def _missing_option(error: MissingConfigException) -> UserError:
    group, _, name = error.missing_cfg_file.rpartition("/")
    typed = {value: key for key, value in GROUP_OF_KEY.items()}.get(group, group)
    options = error.options or _shipped_options(group)
    problem = f"{typed}={name}: there is no configs/{group}/{name}.yaml.{nearest(name, options)}"
    return UserError(problem, key=typed)


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
