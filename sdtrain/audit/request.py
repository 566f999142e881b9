"""What sdtrain-schedule was asked for, checked as far as that goes without torch."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from sdtrain.config.boundary import refuse_repeated_choices
from sdtrain.config.check import Checker
from sdtrain.config.compose import compose_config
from sdtrain.config.overrides import prepared, typed_keys
from sdtrain.config.path_keys import with_homes_in
from sdtrain.config.schema import TrainConfig
from sdtrain.errors import UserError

GROUPS = ("schedule", "modifiers", "prediction", "weighting", "loss", "times", "noise", "grid")
"""Groups that are shown."""

READ = {*GROUPS, "experiment", "sampler"}
"""Groups with an effect: an experiment brings a weighting along, sampler=euler a grid."""


@dataclass(frozen=True)
class Combination:
    """One choice of each group.

    varying: what tells it from the others.
    config: {group: node}.
    typed: the keys that the user typed.
    """

    varying: str
    config: dict[str, dict]
    typed: frozenset[str]


@dataclass(frozen=True)
class AuditRequest:
    """At least one combination, and the folder to write to.

    without_effect: keys that were typed, and that only a run reads.
    """

    combinations: list[Combination]
    output: Path
    without_effect: list[str]


def read_request(words: list[str]) -> AuditRequest:
    """Reads the words of the command line, and expands the comma lists.

    Raises UserError, and what Hydra raises.
    """
    words = prepared(words)
    refuse_repeated_choices(words)
    for word in words:
        if word.startswith("-"):
            raise UserError(
                f"sdtrain-schedule has no flag {word}: comma lists are expanded as they are",
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
    for varying, overrides in expand(choices):
        combinations.append(_combination(varying, overrides))
    return AuditRequest(combinations, output, sorted(_without_effect(typed_keys(choices))))


def _without_effect(typed: Iterable[str]) -> list[str]:
    """The keys that only a run reads; those of Hydra, such as its searchpath, say where to look for
    the others.
    """
    return [key for key in typed if key.partition(".")[0] not in {*READ, "hydra"}]


def expand(words: Iterable[str]) -> list[tuple[str, list[str]]]:
    """(what varies, the overrides) of every combination of the comma lists, in typed order."""
    parsed = OverridesParser.create().parse_overrides(list(words))
    found = []
    for combination in itertools.product(*(_choices(override) for override in parsed)):
        names = []
        for override, chosen in zip(parsed, combination, strict=True):
            # A schedule says its own name, its modifiers' too.
            named_elsewhere = override.get_key_element() in ("schedule", "modifiers")
            if override.is_sweep_override() and not named_elsewhere:
                names.append(_name_of(chosen))
        found.append((", ".join(names), list(combination)))
    return found


def _choices(override: Override) -> list[str]:
    if not override.is_sweep_override():
        return [override.input_line]
    key = override.get_key_element()
    return [f"{key}={value}" for value in override.sweep_string_iterator()]


def _name_of(chosen: str) -> str:
    """Of group=NAME the name; a number is named with its key."""
    is_number = "." in chosen.partition("=")[0]
    return chosen if is_number else chosen.rpartition("=")[2]


def _combination(varying: str, overrides: list[str]) -> Combination:
    config = with_homes_in(compose_config("train", overrides))
    typed = typed_keys(overrides)
    Checker(typed, filled_in=()).call(config, "", TrainConfig)
    nodes = {group: config.get(group) or {} for group in GROUPS}
    for group, node in nodes.items():
        if not node and group != "modifiers":
            raise UserError(
                f"{group} is missing", key=group, remedy=f"Choose one with {group}=NAME."
            )
    return Combination(varying, nodes, frozenset(typed))
