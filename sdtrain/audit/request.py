"""The arguments of sdtrain-schedule, checked as far as possible without torch."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from sdtrain.config.boundary import refuse_repeated_options
from sdtrain.config.check import Checker
from sdtrain.config.compose import compose_config
from sdtrain.config.overrides import prepare_arguments, typed_keys
from sdtrain.config.path_keys import expand_homes_in_config
from sdtrain.config.schema import TrainConfig
from sdtrain.errors import UserError

GROUPS = ("schedule", "modifiers", "prediction", "weighting", "loss", "times", "noise", "grid")
"""The config groups that are shown."""

GROUPS_WITH_EFFECT = {*GROUPS, "experiment", "sampler"}
"""GROUPS, and those that set one of them: an experiment a weighting, sampler=euler a grid."""


@dataclass(frozen=True)
class Combination:
    """One choice from each group.

    label: the choices that tell it from the other combinations, such as "epsilon, min_snr".
    config: {group: node}.
    typed: the keys that are set on the command line.
    """

    label: str
    config: dict[str, dict]
    typed: frozenset[str]


@dataclass(frozen=True)
class AuditRequest:
    """The combinations to show, at least one, and the folder to write to.

    ignored_keys: keys set on the command line that only a run reads.
    """

    combinations: list[Combination]
    output: Path
    ignored_keys: list[str]


def read_request(words: list[str]) -> AuditRequest:
    """Parse the words of the command line, and expand comma lists into combinations.

    Raises UserError, and what Hydra raises.
    """
    words = prepare_arguments(words)
    refuse_repeated_options(words)
    for word in words:
        if word.startswith("-"):
            raise UserError(
                f"sdtrain-schedule has no flag {word}. Lists of values need no flag",
                key=word,
                remedy="Remove it.",
            )
    output = Path("schedules")
    choices = []
    for word in words:
        if word.startswith("output="):
            output = Path(str(OverridesParser.create().parse_override(word).value()))
        else:
            choices.append(word)
    combinations = []
    for label, overrides in expand(choices):
        combinations.append(_combination(label, overrides))
    return AuditRequest(combinations, output, sorted(_ignored(typed_keys(choices))))


def _ignored(typed: Iterable[str]) -> list[str]:
    """Return the keys that only a run reads.

    Hydra's own keys, such as hydra.searchpath, are not ignored: they say where options are found.
    """
    effective = {*GROUPS_WITH_EFFECT, "hydra"}
    return [key for key in typed if key.partition(".")[0] not in effective]


def expand(words: Iterable[str]) -> list[tuple[str, list[str]]]:
    """Return (label, overrides) for every combination of the comma lists, in the order given."""
    overrides = OverridesParser.create().parse_overrides(list(words))
    alternatives = [_alternatives(override) for override in overrides]
    combinations = []
    for choices in itertools.product(*alternatives):
        names = []
        for override, choice in zip(overrides, choices, strict=True):
            # The name of a schedule already contains its own and its modifiers' names.
            is_in_name = override.get_key_element() in ("schedule", "modifiers")
            if override.is_sweep_override() and not is_in_name:
                names.append(_short_name(choice))
        combinations.append((", ".join(names), list(choices)))
    return combinations


def _alternatives(override: Override) -> list[str]:
    if not override.is_sweep_override():
        return [override.input_line]
    key = override.get_key_element()
    return [f"{key}={value}" for value in override.sweep_string_iterator()]


def _short_name(choice: str) -> str:
    """Return NAME for group=NAME, but all of a choice with a dotted key: schedule.scale=1."""
    is_dotted = "." in choice.partition("=")[0]
    return choice if is_dotted else choice.rpartition("=")[2]


def _combination(label: str, overrides: list[str]) -> Combination:
    config = expand_homes_in_config(compose_config("train", overrides))
    typed = typed_keys(overrides)
    Checker(typed, filled_in=()).call(config, "", TrainConfig)
    nodes = {group: config.get(group) or {} for group in GROUPS}
    for group, node in nodes.items():
        if not node and group != "modifiers":
            raise UserError(
                f"{group} is missing", key=group, remedy=f"Choose one with {group}=NAME."
            )
    return Combination(label, nodes, frozenset(typed))
