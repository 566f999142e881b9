"""What each run trains: effective weights, and runs whose objectives are the same."""

from dataclasses import dataclass

from sdtrain.assemble.objective import build_objective
from sdtrain.config.trusted import is_ours, targets
from sdtrain.diffusion.effective_weight import ComparedObjective, find_relations
from sdtrain.errors import UserError
from sdtrain.report import figures
from sdtrain.report.compare import Comparison
from sdtrain.report.section import Picture, Section

NEEDED = ("schedule", "prediction", "weighting", "times", "noise")
READ = (*NEEDED, "modifiers", "loss")


@dataclass(frozen=True)
class Objectives:
    """What runs and arms train.

    known: by the name of the run or arm.
    unknown: a line for each whose objective cannot be told.
    """

    known: dict[str, ComparedObjective]
    unknown: list[str]


def read_objectives(comparison: Comparison) -> Objectives:
    """Builds the objectives of all runs, ranked or not.

    A configuration may name only what is ours.
    """
    configs = {arm.name: arm.runs[0].config for arm in comparison.arms}
    for run in (*comparison.unfinished, *(run for run, _ in comparison.refused)):
        if run.config:
            configs[run.name] = run.config
    known = {}
    unknown = []
    for name, config in configs.items():
        try:
            known[name] = _objective(config)
        except UserError as error:
            unknown.append(f"{name}: its effective weight is not shown: {error}")
    return Objectives(known, unknown)


def _objective(config: dict) -> ComparedObjective:
    nodes = {group: config.get(group) or {} for group in READ}
    for group in NEEDED:
        if "_target_" not in nodes[group]:
            raise UserError(f"its configuration has no {group}", key=group)
    for group, node in nodes.items():
        for target in targets(node):
            if not is_ours(target):
                raise UserError(f"{target} is not a part that sdtrain builds", key=group)
    objective = build_objective(nodes)
    return ComparedObjective(objective, nodes["prediction"], nodes["loss"], nodes["noise"])


def objectives(found: Objectives) -> Section:
    """The effective weights, duplicates, and the same objectives for other outputs."""
    names = list(found.known)
    relations = dict(zip(names, find_relations(list(found.known.values())), strict=True))
    groups = {}
    reparameterised = []
    for name, relation in relations.items():
        if relation.duplicates:
            alike = sorted([names.index(name), *relation.duplicates])
            groups["; ".join(names[place] for place in alike)] = None
        if relation.reparameterised:
            others = ", ".join(names[place] for place in relation.reparameterised)
            reparameterised.append(f"{name}: same objective, other parameterisation: {others}.")
    notes = []
    for group in groups:
        notes.append(
            "Duplicates by their objective (schedule, prediction, weighting, loss, times, noise) "
            f"alone: {group}."
        )
    weights = {}
    for name, objective in found.known.items():
        if objective.weight is not None:
            weights[name] = objective.weight
    drawn = [Picture("effective_weights", figures.weights(weights))] if weights else []
    return Section("What was trained", [*drawn, *notes, *found.unknown, *reparameterised])
