"""The command line of a sweep, checked without torch.

Hydra would take these words silently, and leave them without effect.
"""

from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from sdtrain.config.flags import INFO, read_flags
from sdtrain.config.overrides import is_sweep
from sdtrain.errors import UserError

SHOWING_FLAGS = {"--cfg", INFO}
OF_A_SINGLE_RUN = ("hydra.run.dir", "hydra.sweep.subdir")


def check_words(words: Sequence[str]) -> None:
    """Raises UserError for words that a sweep cannot follow."""
    flags, setting = read_flags(words)
    showing = {flag.name for flag in flags} & SHOWING_FLAGS
    if showing and is_sweep(words):
        raise UserError(
            "--cfg and --info show one run and not several",
            key=min(showing),
            remedy="Remove them, or -m and the values after the first.",
        )
    overrides = _parsed(setting)
    swept = {override.key_or_group for override in overrides if override.is_sweep_override()}
    _refuse_intervals(overrides)
    _refuse_repetition([override.key_or_group for override in overrides], swept)
    for override in overrides:
        key = override.key_or_group
        if key in OF_A_SINGLE_RUN:
            raise UserError(
                f"{key} is not a sweep's: its folder is hydra.sweep.dir, "
                "and arms are named by what differs",
                key=key,
                remedy="Set hydra.sweep.dir.",
            )
    if "sweep" in swept:
        raise UserError(
            "sweep=NAME,NAME names several sweeps", key="sweep", remedy="Start one after the other."
        )


def _parsed(words: Sequence[str]) -> list[Override]:
    """The words that set a key. Raises Hydra's OverrideParseException."""
    setting = []
    for word in words:
        if "=" in word:
            setting.append(word)
    return OverridesParser.create().parse_overrides(setting)


def _refuse_intervals(overrides: list[Override]) -> None:
    for override in overrides:
        if override.is_interval_sweep():
            key = override.key_or_group
            raise UserError(
                f"{key}=interval(...) names no values",
                key=key,
                remedy=f"Write them out, {key}=value,value.",
            )


def _refuse_repetition(keys: list[str], swept: set[str]) -> None:
    for key in keys:
        if key in swept and keys.count(key) > 1:
            raise UserError(
                f"{key} is given twice, and several values of it would be lost",
                key=key,
                remedy="Remove one of the two.",
            )
