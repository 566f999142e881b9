"""Configuration to a drawing: sampler, grid, steps and guidance."""

import inspect
import math
from typing import Any

import torch
from torch import Tensor

from sdtrain.config.build import build
from sdtrain.diffusion.guidance import CONDITIONED, UNCONDITIONED
from sdtrain.errors import UserError
from sdtrain.generation.drawing import Drawing, named
from sdtrain.samplers.grids import default, default_of
from sdtrain.schedules import Schedule

REMEDY = "Change sampler, grid, steps or guidance."


def build_drawing(cfg: dict, schedule: Schedule) -> Drawing:
    """Built, and tried on two steps of nothing: what its parts refuse is reported now and not after
    hours.
    """
    if not math.isfinite(cfg["guidance_scale"]):
        raise UserError("must be a number", key="guidance_scale", value=cfg["guidance_scale"])
    drawing = Drawing(
        sampler=build(cfg["sampler"], "sampler"),
        grid=build(cfg["grid"], "grid"),
        guidance=build(cfg["guidance"], "guidance"),
        steps=cfg["steps"],
        guidance_scale=cfg["guidance_scale"],
        batch_size=cfg.get("batch_size", 64),
        chosen={
            "sampler": named(cfg["sampler"]),
            "grid": _named_grid(cfg["grid"], schedule),
            "guidance": named(cfg["guidance"]),
        },
    )
    grid = _grid(drawing, schedule)
    try:
        _try(drawing, schedule, grid)
    except (ValueError, TypeError) as error:
        raise UserError(str(error), key="sampler", remedy=REMEDY) from error
    return drawing


def _named_grid(node: dict, schedule: Schedule) -> dict[str, Any]:
    """Of grid=default the one that it is under this schedule."""
    if node["_target_"] != f"{default.__module__}.{default.__name__}":
        return named(node)
    grid = default_of(schedule)
    arguments = inspect.getfullargspec(grid).kwonlydefaults or {}
    return {"name": grid.__name__, **arguments}


def _grid(drawing: Drawing, schedule: Schedule) -> Tensor:
    """Its times [steps]. Raises UserError where there are none for so many steps."""
    try:
        grid = drawing.grid(drawing.steps, schedule)
    except (ValueError, TypeError) as error:
        raise UserError(str(error), key="grid", remedy=REMEDY) from error
    if not bool((grid.diff() < 0).all()):
        raise UserError(
            "gives a grid that visits a time twice, its levels lie too close for "
            f"schedule={schedule.name}",
            key="steps",
            value=drawing.steps,
            remedy=REMEDY,
        )
    return grid


def _try(drawing: Drawing, schedule: Schedule, grid: Tensor) -> None:
    nothing = torch.zeros(1, 1, 1, 1)

    def identity(x: Tensor, t: Tensor) -> Tensor:
        return x

    denoisers = {CONDITIONED: identity, UNCONDITIONED: identity}
    guided = drawing.guidance(denoisers, drawing.guidance_scale, schedule)
    drawing.sampler(guided, nothing, grid[:2], schedule, lambda step: nothing)
