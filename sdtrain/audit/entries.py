"""A combination of schedule, prediction, weighting and times, and the numbers that describe it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sdtrain.assemble.objective import build_objective, build_schedule, choose_weighting
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
"""The numbers of sampling steps for which the visited noise levels are shown."""


@dataclass
class Entry:
    """One combination, built: a row of the table.

    objective: None where it is refused.
    refusal: the error that refused the objective, otherwise None.
    duplicate_of, same_objective_as: names of other entries, see find_relations.
    """

    name: str
    config: dict[str, dict]
    schedule: Schedule
    grid: Callable[[int, Schedule], Tensor]
    notes: list[str]
    objective: ComparedObjective | None = None
    refusal: UserError | None = None
    duplicate_of: list[str] = field(default_factory=list)
    same_objective_as: list[str] = field(default_factory=list)

    @property
    def weight(self) -> EffectiveWeight | None:
        """The effective weight.

        None if the objective is refused, or if all of its levels lie beyond LOG_SNR_LIMIT.
        """
        return self.objective.weight if self.objective else None

    @property
    def terminal_alpha_sigma(self) -> tuple[float, float]:
        """(alpha, sigma) at t = 1."""
        end = torch.ones((), dtype=torch.float64)
        alpha, sigma = self.schedule.alpha_sigma(end, torch.float64)
        return alpha.item(), sigma.item()

    @property
    def leaked_variance(self) -> float:
        """The data's share of the variance at t = 1, for latents of unit variance."""
        alpha, sigma = self.terminal_alpha_sigma
        return alpha**2 / (alpha**2 + sigma**2)

    @property
    def shown_steps(self) -> list[int]:
        """The numbers of STEPS that are not larger than the schedule's number of timesteps."""
        return [steps for steps in STEPS if steps <= self.schedule.num_timesteps]

    def visited_log_snrs(self, steps: int) -> list[float]:
        """Return the log_snr of each level that a sampler visits in so many steps.

        Raises ValueError if the grid cannot have so many.
        """
        return self.schedule.log_snr(self.grid(steps, self.schedule)).tolist()

    def option_name(self, group: str) -> str:
        """Return the name of the option chosen from a config group.

        A weighting is named after its file, other parts after their class or function.
        """
        module, _, name = self.config[group]["_target_"].rpartition(".")
        return module.rpartition(".")[2] if group == "weighting" else name.lower()

    def record(self) -> dict[str, Any]:
        """Return all numbers as plain values for JSON."""
        alpha, sigma = self.terminal_alpha_sigma
        t = torch.linspace(0, 1, 101, dtype=torch.float64)
        options = {}
        for group in GROUPS:
            if group not in ("schedule", "modifiers"):
                options[group] = self.option_name(group)
        visited = {}
        for steps in self.shown_steps:
            visited[str(steps)] = self.visited_log_snrs(steps)
        weight = None
        if self.weight is not None:
            weight = {
                "log_snr": self.weight.log_snr.tolist(),
                "weight": self.weight.weight.tolist(),
            }
        return {
            "name": self.name,
            "schedule": self.schedule.name,
            **options,
            "num_timesteps": self.schedule.num_timesteps,
            "terminal_snr": (alpha / sigma) ** 2,
            "terminal_alpha": alpha,
            "leaked_mean": alpha,
            "leaked_variance": self.leaked_variance,
            "log_snr_at_0": self.schedule.log_snr_max,
            "log_snr_at_1": self.schedule.log_snr_min,
            "t": t.tolist(),
            "log_snr": self.schedule.log_snr(t).tolist(),
            "visited": visited,
            "effective_weight": weight,
            "duplicate_of": self.duplicate_of,
            "same_objective_as": self.same_objective_as,
            "refused": str(self.refusal) if self.refusal else None,
        }


def make_entries(combinations: Iterable[Combination]) -> list[Entry]:
    """Build an entry for each combination, and note which train the same objective.

    Raises UserError if one cannot be built.
    """
    entries = [make_entry(combination) for combination in combinations]
    _number_equal_names(entries)
    _note_relations(entries)
    return entries


def make_entry(combination: Combination) -> Entry:
    """Build the parts that the combination names.

    An objective that cannot be trained is kept as the entry's refusal. Raises UserError if another
    part cannot be built.
    """
    checker = Checker(combination.typed)
    config = {}
    for group, node in combination.config.items():
        config[group] = checker.node(node, group)
    schedule = build_schedule(config)
    name = schedule.name
    if combination.label:
        name += f", {combination.label}"
    entry = Entry(name, config, schedule, build(config["grid"], "grid"), checker.notes)
    try:
        for steps in entry.shown_steps:
            entry.visited_log_snrs(steps)
    except ValueError as error:
        raise UserError(str(error), key="grid", remedy="Change grid.") from error
    try:
        config["weighting"], note = choose_weighting(config, combination.typed)
        objective = build_objective(config)
    except UserError as error:
        entry.refusal = error
        entry.notes.append(f"refused. {error}")
        return entry
    if note:
        entry.notes.append(note)
    entry.objective = ComparedObjective(
        objective, config["prediction"], config["loss"], config["noise"]
    )
    return entry


def _number_equal_names(entries: list[Entry]) -> None:
    """Append " (2)", " (3)", ... to names that an earlier entry has."""
    counts: dict[str, int] = {}
    for entry in entries:
        name = entry.name
        counts[name] = counts.get(name, 0) + 1
        if counts[name] > 1:
            entry.name = f"{name} ({counts[name]})"


def _note_relations(entries: list[Entry]) -> None:
    """Note for each entry its duplicates and those with the same objective, other prediction."""
    relations_of_entries = find_relations([entry.objective for entry in entries])
    for entry, relations in zip(entries, relations_of_entries, strict=True):
        entry.duplicate_of = [entries[index].name for index in relations.duplicates]
        entry.same_objective_as = [entries[index].name for index in relations.reparameterised]
        if entry.duplicate_of:
            entry.notes.append(f"duplicate of {'; '.join(entry.duplicate_of)}")
        if entry.same_objective_as:
            others = ", ".join(entry.same_objective_as)
            entry.notes.append(f"same objective with another prediction: {others}")
