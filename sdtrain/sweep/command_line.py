"""Checks of a sweep's command line. They need no torch.

Hydra would accept all of these arguments and silently ignore them.
"""

from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from sdtrain.config.flags import INFO, read_flags
from sdtrain.config.overrides import is_sweep
from sdtrain.errors import UserError

PRINT_ONLY_FLAGS = {"--cfg", INFO}
SINGLE_RUN_KEYS = ("hydra.run.dir", "hydra.sweep.subdir")


def check_command_line(arguments: Sequence[str]) -> None:
    """Raise UserError for arguments that have no meaning in a sweep."""
    flags, words = read_flags(arguments)
    print_only = {flag.name for flag in flags} & PRINT_ONLY_FLAGS
    if print_only and is_sweep(arguments):
        raise UserError(
            "--cfg and --info show one run, not a sweep",
            key=min(print_only),
            remedy="Remove them, or remove -m and all values of a key but one.",
        )
    overrides = _parse_overrides(words)
    _refuse_intervals(overrides)
    keys = []
    swept_keys = set()
    for override in overrides:
        keys.append(override.key_or_group)
        if override.is_sweep_override():
            swept_keys.add(override.key_or_group)
    _refuse_repeated_keys(keys, swept_keys)
    for key in keys:
        if key in SINGLE_RUN_KEYS:
            raise UserError(
                f"{key} applies to a single run. The folder of a sweep is hydra.sweep.dir, and "
                "each arm's folder is named after the overrides in which it differs",
                key=key,
                remedy="Set hydra.sweep.dir.",
            )
    if "sweep" in swept_keys:
        raise UserError(
            "sweep=NAME,NAME names several sweeps",
            key="sweep",
            remedy="Start one after the other.",
        )


def _parse_overrides(words: Sequence[str]) -> list[Override]:
    """Parse the words of the form key=value. Raises Hydra's OverrideParseException."""
    assignments = []
    for word in words:
        if "=" in word:
            assignments.append(word)
    return OverridesParser.create().parse_overrides(assignments)


def _refuse_intervals(overrides: list[Override]) -> None:
    for override in overrides:
        if override.is_interval_sweep():
            key = override.key_or_group
            raise UserError(
                f"{key}=interval(...) does not list the values to try",
                key=key,
                remedy=f"Write them out: {key}=value,value.",
            )


def _refuse_repeated_keys(keys: list[str], swept_keys: set[str]) -> None:
    for key in keys:
        if key in swept_keys and keys.count(key) > 1:
            raise UserError(
                f"{key} is set twice and has several values, of which Hydra would drop some",
                key=key,
                remedy="Set it once.",
            )
