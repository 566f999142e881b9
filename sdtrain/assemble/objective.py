"""Build schedule and objective from the configuration. Needs torch alone, and no weights."""

from collections.abc import Iterable

from sdtrain.config.build import build
from sdtrain.diffusion import Density, Objective, WeightingError
from sdtrain.errors import UserError
from sdtrain.schedules import Schedule
from sdtrain.schedules.table import read_numbers

DEFAULT_WEIGHTING = {"_target_": "sdtrain.diffusion.weighting.simple.Simple"}


def build_schedule(cfg: dict) -> Schedule:
    """Build the schedule and apply its modifiers in their order."""
    schedule = build(cfg["schedule"], "schedule")
    for name, node in (cfg.get("modifiers") or {}).items():
        if "_target_" not in node:
            raise UserError(
                f"modifiers.{name} has settings, but the modifier is not selected",
                key="modifiers",
                remedy=f"Set modifiers=[{name}].",
            )
        schedule = build(node, f"modifiers.{name}")(schedule)
    return schedule


def build_objective(cfg: dict) -> Objective:
    """Build the objective. Raises UserError for a combination that cannot be trained."""
    schedule = build_schedule(cfg)
    times = build(cfg["times"], "times")
    return Objective(
        schedule=schedule,
        prediction=build(cfg["prediction"], "prediction"),
        weighting=build(cfg["weighting"], "weighting", density=Density(schedule, times)),
        times=times,
        loss=build(cfg["loss"], "loss") if cfg.get("loss") else None,
    )


def choose_weighting(cfg: dict, typed: Iterable[str]) -> tuple[dict, str | None]:
    """Return the weighting to train with, and a note if it is not the configuration's.

    A weighting from an experiment is replaced by `simple` if it does not work with what the user
    set. One that was typed raises UserError instead.

    typed: keys that were typed on the command line.
    """
    try:
        build_objective(cfg)
    except WeightingError as error:
        if any(key.partition(".")[0] == "weighting" for key in typed):
            raise
        build_objective(cfg | {"weighting": DEFAULT_WEIGHTING})
        return DEFAULT_WEIGHTING, f"weighting=simple is used: {error.problem.rstrip('.')}."
    return cfg["weighting"], None


def inline_table(schedule: dict) -> dict:
    """Return the schedule's node with the name of a table file replaced by its contents.

    The run then does not depend on the file. Other schedules are returned unchanged.
    """
    if schedule["_target_"] != "sdtrain.schedules.table.table":
        return schedule
    inlined = dict(schedule)
    for name in ("betas", "alphas_cumprod"):
        if isinstance(schedule.get(name), str):
            inlined[name] = read_numbers(schedule[name], f"schedule.{name}")
    return inlined
