"""The error boundary of all commands: every error but a bug becomes one paragraph and an exit code.

Imports neither torch nor Lightning, so that --help, completion and error messages are quick.
"""

import logging
import os
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from sdtrain.config.cache_keys import KEY as CACHE_KEY
from sdtrain.config.check import suggest
from sdtrain.config.compose import known_keys
from sdtrain.config.launch import remove_empty_variables
from sdtrain.config.overrides import (
    GROUP_OF_KEY,
    find_repeated_option,
    prepare_arguments,
    typed_values,
)
from sdtrain.console import fail, secure_streams
from sdtrain.errors import StorageError, UserError
from sdtrain.paths import config_dir, search_working_directory_last
from sdtrain.runs.resume import flatten

CONFIGURATION_ERRORS = (HydraException, OmegaConfBaseException)

OUTPUT_KEYS = ("hydra.run.dir", "hydra.sweep.dir", "output")
"""Keys that say where a command writes."""


@contextmanager
def error_boundary(config_name: str, output_key: str = "output") -> Iterator[None]:
    """For every error that is not a bug, print one paragraph on stderr and raise SystemExit.

    Args:
        config_name: name of the yaml whose keys may be suggested in place of an unknown one.
        output_key: the key that says where the command writes.
    """
    # diffusers imports bitsandbytes wherever it is installed, which then advises to install more.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        search_working_directory_last()
        remove_empty_variables()
        yield
    except CONFIGURATION_ERRORS as error:
        _exit_with(as_user_error(error, lambda: known_keys(config_name), sys.argv[1:]))
    except UserError as error:
        _exit_with(error)
    except OSError as error:
        problem = f"{error.strerror}: {error.filename}"
        remedy = f"Set {output_key} to another place."
        _exit_with(StorageError(problem, key=output_key, remedy=remedy))
    except KeyboardInterrupt:
        sys.exit(130)


def _exit_with(error: UserError) -> NoReturn:
    fail(error.exit_code, str(error), error.log, on_every_rank=error.on_every_rank)


def run_command(
    task: Callable[[DictConfig], None],
    config_name: str,
    *,
    output_key: str = "output",
    repeatable: Collection[str] = (),
    extra_overrides: Callable[[list[str]], list[str]] | None = None,
) -> None:
    """Compose the configuration from the command line and run a task on it, within the boundary.

    Args:
        task: (configuration) -> None.
        config_name: name of the command's yaml in configs/.
        output_key: the key that says where the command writes.
        repeatable: keys that may be set several times.
        extra_overrides: (arguments as Hydra reads them) -> overrides to add to them.
    """
    secure_streams()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let Hydra raise, instead of print and exit with 1

    @hydra.main(config_path=str(config_dir()), config_name=config_name, version_base="1.3")
    def app(cfg: DictConfig) -> None:
        # An inner boundary, because Hydra would print what the task raises.
        with error_boundary(config_name, output_key):
            task(cfg)

    typed = sys.argv[1:]
    with error_boundary(config_name, output_key):
        arguments = prepare_arguments(typed, repeatable)
        _check_output_keys(arguments)
        refuse_repeated_options(arguments)
        extra = prepare_arguments(extra_overrides(arguments)) if extra_overrides else []
        sys.argv[1:] = arguments + extra
        app()


def _check_output_keys(arguments: list[str]) -> None:
    """Raise UserError for an empty value, which would write into the working directory."""
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key.lstrip("+") in OUTPUT_KEYS and equals and not value.strip("'\" "):
            raise UserError("is empty", key=key, value="", remedy="Set it to a folder.")


def refuse_repeated_options(overrides: Iterable[str]) -> None:
    """Raise UserError if a list of options names one twice: Hydra would apply it once."""
    for override in overrides:
        key, name = find_repeated_option(override)
        if name and (config_dir() / key).is_dir():
            raise UserError(
                f"{key} names {name} twice, but it would be applied once",
                key=key,
                remedy="Leave one out. To make its effect stronger, set its own keys.",
            )


def as_user_error(
    error: Exception, known: Callable[[], list[str]], arguments: Iterable[str] = ()
) -> UserError:
    """Convert an error of Hydra or OmegaConf to a UserError that suggests the closest known key.

    Args:
        error: what was raised.
        known: returns the keys of the configuration; called only if they are needed.
        arguments: of the command line.
    """
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _missing_option_error(error)
    text = str(error)
    match = re.match(r"Ambiguous value for argument '(.+)'", text)
    if match:
        return _several_values_error(match[1])
    if isinstance(error, OverrideParseException):
        return UserError(
            f"'{error.override}' is not a valid override: {text.splitlines()[0]}",
            key=error.override.partition("=")[0],
            remedy="Write key=value, and put values with spaces, commas or brackets in quotes: "
            "'key=\"value\"'.",
        )
    match = re.search(r"An item is already at '([^']+)'", text)
    if match:
        key = match[1]
        return UserError(f"'{key}' exists already", key=key, remedy=f"Write {key}=... without a +.")
    match = re.match(r"Could not (?:override|append|delete)[^']*'([^']+)'", text)
    if match:
        key = match[1].rstrip(".").partition("@")[0]
        known_keys = [*known(), *_keys_of_typed_option(key, arguments)]
        return _key_of_some_options_error(key, arguments) or _missing_key_error(key, known_keys)
    return _omegaconf_error(error)


def _omegaconf_error(error: Exception) -> UserError:
    """Convert an error of OmegaConf, or one of Hydra that was caused by it."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    key = getattr(cause, "full_key", None)
    problem = str(cause).splitlines()[0]
    if isinstance(cause, MissingMandatoryValue):
        return UserError(problem, key=key, remedy=f"Set {key}=...")
    return UserError(problem + (f" (key {key})" if key else ""), key=key)


def _several_values_error(override: str) -> UserError:
    key, _, values = override.partition("=")
    return UserError(
        f"{override} sets several values for one run",
        key=key,
        remedy="Choose one, start a run for each with -m (sdtrain only), or put a text that "
        f"contains commas in quotes: '{key}=\"{values}\"'.",
    )


def _missing_option_error(error: MissingConfigException) -> UserError:
    group, _, name = error.missing_cfg_file.rpartition("/")
    key = group
    for typed_key, typed_group in GROUP_OF_KEY.items():
        if typed_group == group:
            key = typed_key
    options = error.options or _shipped_options(group)
    problem = f"{key}={name}: there is no configs/{group}/{name}.yaml.{suggest(name, options)}"
    return UserError(problem, key=key)


def _key_of_some_options_error(key: str, arguments: Iterable[str]) -> UserError | None:
    """Return an error if a sweep sets a key that only some of the options swept over have."""
    group = key.partition(".")[0]
    for name, values in typed_values(arguments).items():
        if name != group or "," not in values:
            continue
        for option in values.split(","):
            path = config_dir() / group / f"{option}.yaml"
            if path.is_file() and _has_key(path, key):
                return UserError(
                    f"Not every option of {group}={values} has the key {key}, but {option} has it",
                    key=key,
                    remedy=f"Sweep over the others without it, and start {group}={option} with a "
                    f"second command: -m {group}={option} and the same hydra.sweep.dir.",
                )
    return None


def _keys_of_typed_option(key: str, arguments: Iterable[str]) -> list[str]:
    """Return the keys that the typed option of the key's group sets, as data=images does."""
    group = key.partition(".")[0]
    path = config_dir() / group / f"{typed_values(arguments).get(group)}.yaml"
    if not path.is_file():
        return []
    keys = []
    for name, _ in flatten(OmegaConf.to_container(OmegaConf.load(path))):
        keys.append(name if name.startswith(f"{group}.") else f"{group}.{name}")
    return keys


def _has_key(path: Path, key: str) -> bool:
    """Whether an option's yaml sets `key`, which begins with the name of the group."""
    node = OmegaConf.load(path)
    _, _, key_in_group = key.partition(".")
    if OmegaConf.select(node, key_in_group) is not None:
        return True
    return key_in_group in node or key in node


def _missing_key_error(key: str, known: list[str]) -> UserError:
    if key in known:
        return UserError(
            f"There is no key '{key}' here: one of the chosen options removes it",
            key=key,
            remedy=f"Remove {key}, or choose another option.",
        )
    if key == CACHE_KEY:
        return UserError(
            f"There is no key '{key}' here: the data set draws its pictures, which have no cached "
            "form",
            key=key,
            remedy=f"Remove {key}, or choose data=images or data=dataset.",
        )
    return UserError(f"There is no key '{key}'.{suggest(key, known)}", key=key)


def _shipped_options(group: str) -> list[str]:
    """Return the options of a group. Hydra does not list them if several may be chosen at once."""
    return [path.stem for path in (config_dir() / group).glob("*.yaml")]
