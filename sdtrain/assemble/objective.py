"""Configuration to schedule and objective. Needs torch alone: no weight is made."""

from collections.abc import Iterable

from sdtrain.config.build import build
from sdtrain.diffusion import Density, Objective, WeightingError
from sdtrain.errors import UserError
from sdtrain.schedules import Schedule
from sdtrain.schedules.table import read

DEFAULT_WEIGHTING = {"_target_": "sdtrain.diffusion.weighting.simple.Simple"}


def build_schedule(cfg: dict) -> Schedule:
    """The schedule with its modifiers, in the order in which they stand."""
    schedule = build(cfg["schedule"], "schedule")
    for name, node in (cfg.get("modifiers") or {}).items():
        if "_target_" not in node:
            raise UserError(
                f"modifiers.{name} is not chosen",
                key="modifiers",
                remedy=f"Set modifiers=[{name}].",
            )
        schedule = build(node, f"modifiers.{name}")(schedule)
    return schedule


def build_objective(cfg: dict) -> Objective:
    """Raises UserError for whatever cannot be trained."""
    schedule = build_schedule(cfg)
    times = build(cfg["times"], "times")
    return Objective(
        schedule=schedule,
        prediction=build(cfg["prediction"], "prediction"),
        weighting=build(cfg["weighting"], "weighting", density=Density(schedule, times)),
        times=times,
        loss=build(cfg["loss"], "loss") if cfg.get("loss") else None,
    )


def fitting_weighting(cfg: dict, typed: Iterable[str]) -> tuple[dict, str | None]:
    """(the weighting to train with, a note where it is not the configuration's).

    A weighting that an experiment brought along, and that cannot serve what the user typed, makes
    way for `simple`; one that the user typed is refused with UserError.
    """
    try:
        build_objective(cfg)
    except WeightingError as refusal:
        if any(key.partition(".")[0] == "weighting" for key in typed):
            raise
        build_objective(cfg | {"weighting": DEFAULT_WEIGHTING})
        return DEFAULT_WEIGHTING, f"weighting=simple is used: {refusal.problem.rstrip('.')}."
    return cfg["weighting"], None


def with_table(schedule: dict) -> dict:
    """The schedule's node with a table that lies in a file read into it, so that a run does not
    depend on the file.
    """
    if schedule["_target_"] != "sdtrain.schedules.table.table":
        return schedule
    read_in = dict(schedule)
    for name in ("betas", "alphas_cumprod"):
        if isinstance(schedule.get(name), str):
            read_in[name] = read(schedule[name], f"schedule.{name}")
    return read_in
