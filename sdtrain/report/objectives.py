"""The objective of each run: effective weights, and runs that train the same objective."""

from dataclasses import dataclass

from sdtrain.assemble.objective import build_objective
from sdtrain.config.trusted import is_part_of_sdtrain, iterate_targets
from sdtrain.diffusion.effective_weight import ComparedObjective, find_relations
from sdtrain.errors import UserError
from sdtrain.report import figures
from sdtrain.report.compare import Comparison
from sdtrain.report.section import Picture, Section

REQUIRED_GROUPS = ("schedule", "prediction", "weighting", "times", "noise")
GROUPS = (*REQUIRED_GROUPS, "modifiers", "loss")


@dataclass(frozen=True)
class Objectives:
    """The objectives of runs and arms.

    built: {name of the run or arm: its objective}.
    failures: a sentence for each run or arm whose objective could not be built.
    """

    built: dict[str, ComparedObjective]
    failures: list[str]


def build_objectives(comparison: Comparison) -> Objectives:
    """Build the objectives of all arms and of the runs that are not ranked.

    One whose configuration names code outside sdtrain is not built but listed as a failure.
    """
    configs = {arm.name: arm.runs[0].config for arm in comparison.arms}
    not_comparable = [run for run, _ in comparison.not_comparable]
    for run in (*comparison.unfinished, *not_comparable):
        if run.config:
            configs[run.name] = run.config
    built = {}
    failures = []
    for name, config in configs.items():
        try:
            built[name] = _build_objective(config)
        except UserError as error:
            failures.append(f"{name}: its effective weight is not shown: {error}")
    return Objectives(built, failures)


def _build_objective(config: dict) -> ComparedObjective:
    """Raises UserError where a group is missing or names code outside sdtrain."""
    nodes = {group: config.get(group) or {} for group in GROUPS}
    for group in REQUIRED_GROUPS:
        if "_target_" not in nodes[group]:
            raise UserError(f"its configuration has no {group}", key=group)
    for group, node in nodes.items():
        for target in iterate_targets(node):
            if not is_part_of_sdtrain(target):
                raise UserError(f"{target} is not part of sdtrain", key=group)
    objective = build_objective(nodes)
    return ComparedObjective(objective, nodes["prediction"], nodes["loss"], nodes["noise"])


def objectives_section(objectives: Objectives) -> Section:
    """Return a section with the effective weights and the relations between the objectives."""
    weights = {}
    for name, objective in objectives.built.items():
        if objective.weight is not None:
            weights[name] = objective.weight
    plots = []
    if weights:
        plots.append(Picture("effective_weights", figures.plot_effective_weights(weights)))
    duplicates, reparameterised = _relation_notes(objectives.built)
    return Section(
        "Training objectives", [*plots, *duplicates, *objectives.failures, *reparameterised]
    )


def _relation_notes(built: dict[str, ComparedObjective]) -> tuple[list[str], list[str]]:
    """Return (a note for each group of duplicates, a note for each reparameterised objective)."""
    names = list(built)
    duplicates = []
    reparameterised = []
    for index, relations in enumerate(find_relations(list(built.values()))):
        if relations.duplicates:
            group = sorted([index, *relations.duplicates])
            group_names = "; ".join(names[member] for member in group)
            note = (
                "Duplicates in their objective (schedule, prediction, weighting, loss, times, "
                f"noise), whatever else differs: {group_names}."
            )
            if note not in duplicates:
                duplicates.append(note)
        if relations.reparameterised:
            others = ", ".join(names[other] for other in relations.reparameterised)
            reparameterised.append(
                f"{names[index]}: same objective with another prediction: {others}."
            )
    return duplicates, reparameterised
