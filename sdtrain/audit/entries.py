"""A combination of schedule, prediction, weighting and times, and what it amounts to."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sdtrain.assemble.objective import build_objective, build_schedule, fitting_weighting
from sdtrain.audit.request import GROUPS, Combination
from sdtrain.config.build import build
from sdtrain.config.check import Checker
from sdtrain.diffusion.effective_weight import (
    ComparedObjective,
    EffectiveWeight,
    find_relations,
)
from sdtrain.errors import UserError
from sdtrain.schedules import Schedule

STEPS = (10, 25, 50)
"""Numbers of steps of a sampler whose levels are shown."""


@dataclass
class Entry:
    """One combination, built.

    compared: its objective, None where that is refused.
    refusal: why it is refused.
    duplicate_of, same_objective_as: names of other entries, see find_relations.
    """

    name: str
    config: dict[str, dict]
    schedule: Schedule
    grid: Callable[[int, Schedule], Tensor]
    notes: list[str]
    compared: ComparedObjective | None = None
    refusal: UserError | None = None
    duplicate_of: list[str] = field(default_factory=list)
    same_objective_as: list[str] = field(default_factory=list)

    @property
    def weight(self) -> EffectiveWeight | None:
        """None where the objective is refused, or all of its levels lie too far out."""
        return self.compared.weight if self.compared else None

    @property
    def terminal(self) -> tuple[float, float]:
        """(alpha, sigma) at t = 1."""
        end = torch.ones((), dtype=torch.float64)
        alpha, sigma = self.schedule.alpha_sigma(end, torch.float64)
        return alpha.item(), sigma.item()

    @property
    def leaked_variance(self) -> float:
        """The share of the data in the variance at t = 1, of latents of unit variance."""
        alpha, sigma = self.terminal
        return alpha**2 / (alpha**2 + sigma**2)

    @property
    def steps(self) -> list[int]:
        """Of STEPS those that the schedule has timesteps for."""
        return [steps for steps in STEPS if steps <= self.schedule.num_timesteps]

    def visited(self, steps: int) -> list[float]:
        """The log_snr of each level that a sampler visits. Raises ValueError if it cannot."""
        return self.schedule.log_snr(self.grid(steps, self.schedule)).tolist()

    def choice(self, group: str) -> str:
        """What was chosen, as the option is called.

        Weightings are called by their file, the others by their class or function.
        """
        module, _, name = self.config[group]["_target_"].rpartition(".")
        return module.rpartition(".")[2] if group == "weighting" else name.lower()

    def record(self) -> dict[str, Any]:
        """All numbers, as plain values for JSON."""
        alpha, sigma = self.terminal
        t = torch.linspace(0, 1, 101, dtype=torch.float64)
        named = [group for group in GROUPS if group not in ("schedule", "modifiers")]
        weight = None
        if self.weight is not None:
            weight = {
                "log_snr": self.weight.log_snr.tolist(),
                "weight": self.weight.weight.tolist(),
            }
        return {
            "name": self.name,
            "schedule": self.schedule.name,
            **{group: self.choice(group) for group in named},
            "num_timesteps": self.schedule.num_timesteps,
            "terminal_snr": (alpha / sigma) ** 2,
            "terminal_alpha": alpha,
            "leaked_mean": alpha,
            "leaked_variance": self.leaked_variance,
            "log_snr_at_0": self.schedule.log_snr_max,
            "log_snr_at_1": self.schedule.log_snr_min,
            "t": t.tolist(),
            "log_snr": self.schedule.log_snr(t).tolist(),
            "visited": {str(steps): self.visited(steps) for steps in self.steps},
            "effective_weight": weight,
            "duplicate_of": self.duplicate_of,
            "same_objective_as": self.same_objective_as,
            "refused": str(self.refusal) if self.refusal else None,
        }


def make_entries(combinations: Iterable[Combination]) -> list[Entry]:
    """One entry each, compared with the others. Raises UserError for what cannot be built."""
    entries = [make_entry(combination) for combination in combinations]
    _number_equal_names(entries)
    _compare(entries)
    return entries


def make_entry(combination: Combination) -> Entry:
    """Builds what the combination names. An objective that cannot be trained becomes a refusal."""
    checker = Checker(combination.typed)
    config = {group: checker.node(node, group) for group, node in combination.config.items()}
    schedule = build_schedule(config)
    name = ", ".join(filter(None, [schedule.name, combination.varying]))
    entry = Entry(name, config, schedule, build(config["grid"], "grid"), checker.notes)
    try:
        for steps in entry.steps:
            entry.visited(steps)
    except ValueError as error:
        raise UserError(str(error), key="grid", remedy="Change grid.") from error
    try:
        config["weighting"], note = fitting_weighting(config, combination.typed)
        objective = build_objective(config)
    except UserError as error:
        entry.refusal = error
        entry.notes.append(f"refused. {error}")
        return entry
    if note:
        entry.notes.append(note)
    entry.compared = ComparedObjective(
        objective, config["prediction"], config["loss"], config["noise"]
    )
    return entry


def _number_equal_names(entries: list[Entry]) -> None:
    """Entries of one name are told apart by a number."""
    for name in {entry.name for entry in entries}:
        same = [entry for entry in entries if entry.name == name]
        for number, entry in enumerate(same[1:], 2):
            entry.name = f"{name} ({number})"


def _compare(entries: list[Entry]) -> None:
    """Names the duplicates of each entry, and those that train the same for another output."""
    found = find_relations([entry.compared for entry in entries])
    for entry, relations in zip(entries, found, strict=True):
        entry.duplicate_of = [entries[place].name for place in relations.duplicates]
        entry.same_objective_as = [entries[place].name for place in relations.reparameterised]
        if entry.duplicate_of:
            entry.notes.append(f"duplicate of {', '.join(entry.duplicate_of)}")
        if entry.same_objective_as:
            others = ", ".join(entry.same_objective_as)
            entry.notes.append(f"same objective, other parameterisation: {others}")
