"""The error boundary of all commands: whatever goes wrong is one paragraph and an exit code.

Imports neither torch nor Lightning, so that --help, completion and refusals are quick.
"""

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import hydra
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from sdtrain.config.check import nearest
from sdtrain.config.compose import known_keys
from sdtrain.config.overrides import GROUP_OF_KEY, prepared
from sdtrain.console import fail
from sdtrain.errors import StorageError, UserError
from sdtrain.paths import config_dir

CONFIGURATION_ERRORS = (HydraException, OmegaConfBaseException)


@contextmanager
def error_boundary(config_name: str, output_key: str = "output") -> Iterator[None]:
    """Leaves by SystemExit, after one paragraph on stderr, for every error that is not a bug.

    config_name: the yaml whose keys may be suggested. output_key: the key that says where the
    command writes.
    """
    try:
        yield
    except CONFIGURATION_ERRORS as error:
        fail(UserError.exit_code, hydra_paragraph(error, lambda: known_keys(config_name)))
    except UserError as error:
        log, aloud = getattr(error, "log", None), getattr(error, "aloud", None)
        fail(error.exit_code, str(error), log, aloud=aloud)
    except OSError as error:
        place = f"{error.strerror}: {error.filename}. Set {output_key} to another place."
        fail(StorageError.exit_code, place)
    except KeyboardInterrupt:
        sys.exit(130)


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
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing and leaving with 1

    @hydra.main(config_path=str(config_dir()), config_name=config_name, version_base="1.3")
    def app(cfg: DictConfig) -> None:
        with error_boundary(config_name, output_key):  # within: Hydra prints what a task raises
            task(cfg)

    typed = sys.argv[1:]
    with error_boundary(config_name, output_key):
        words = prepared(typed, repeatable)
        for empty in ("hydra.run.dir=", "hydra.sweep.dir="):
            if empty in words:
                key = empty.removesuffix("=")
                raise UserError("is empty", key=key, value="", remedy="Give a folder.")
        added = prepared(more(words)) if more else []
        sys.argv[1:] = words + added
        app()


def hydra_paragraph(error: Exception, known: Callable[[], list[str]]) -> str:
    """A Hydra or OmegaConf error in a sentence or two, with the nearest key that exists."""
    text = str(error)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        typed = {value: key for key, value in GROUP_OF_KEY.items()}.get(group, group)
        there_is_none = f"{typed}={name}: there is no configs/{group}/{name}.yaml."
        return there_is_none + nearest(name, error.options or _shipped_options(group))
    if isinstance(error, OverrideParseException):
        how = "Write key=value, and put values with spaces, commas or brackets in quotes: "
        example = "'key=\"value\"'."
        return f"'{error.override}' cannot be read: {text.splitlines()[0]}. {how}{example}"
    if match := re.search(r"An item is already at '([^']+)'", text):
        return f"'{match[1]}' is there already: write {match[1]}=... without a +."
    if match := re.match(r"Could not (?:override|append|delete)[^']*'([^']+)'", text):
        key = match[1].rstrip(".").partition("@")[0]
        known_here = known()
        if key in known_here:
            left_out = "an option that was chosen leaves it out."
            return (
                f"There is no key '{key}' here: {left_out} Remove {key}, or choose another option."
            )
        return f"There is no key '{key}'.{nearest(key, known_here)}"
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    key = getattr(cause, "full_key", None)
    if isinstance(cause, MissingMandatoryValue):
        return f"{str(cause).splitlines()[0]}. Set {key}=..."
    return str(cause).splitlines()[0] + (f" (key {key})" if key else "")


def _shipped_options(group: str) -> list[str]:
    """Hydra does not tell the options of a group of which several may be chosen."""
    return [path.stem for path in (config_dir() / group).glob("*.yaml")]
