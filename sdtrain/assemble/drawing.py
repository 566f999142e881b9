"""Build a `Drawing` from the configuration: sampler, grid, steps and guidance."""

import inspect
import math
from typing import Any

import torch
from torch import Tensor

from sdtrain.config.build import build
from sdtrain.diffusion.guidance import CONDITIONED, NOTHING, UNCONDITIONED
from sdtrain.errors import UserError
from sdtrain.generation.drawing import Drawing, record_of
from sdtrain.samplers.grids import default, default_grid
from sdtrain.schedules import Schedule

REMEDY = "Change sampler, grid, steps or guidance."


def build_drawing(cfg: dict, schedule: Schedule) -> Drawing:
    """Build the drawing and try it on two steps of zeros.

    Raises UserError for whatever the sampler, grid or guidance does not accept, so that the user
    learns of it now and not after hours of training.
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
        strength=cfg.get("strength", 1.0),
        records={
            "sampler": record_of(cfg["sampler"]),
            "grid": grid_record(cfg["grid"], schedule),
            "guidance": record_of(cfg["guidance"]),
        },
    )
    grid = _grid(drawing, schedule)
    try:
        _try(drawing, schedule, grid)
    except (ValueError, TypeError) as error:
        raise UserError(str(error), key="sampler", remedy=REMEDY) from error
    return drawing


def grid_record(node: dict, schedule: Schedule) -> dict[str, Any]:
    """Return the record of a grid's node; for grid=default, of the grid that this schedule uses."""
    if node["_target_"] != f"{default.__module__}.{default.__name__}":
        return record_of(node)
    grid = default_grid(schedule)
    arguments = inspect.getfullargspec(grid).kwonlydefaults or {}
    return {"name": grid.__name__, **arguments}


def _grid(drawing: Drawing, schedule: Schedule) -> Tensor:
    """Return the times [steps]. Raises UserError if the grid does not allow that many steps."""
    try:
        grid = drawing.grid(drawing.steps, schedule)
    except (ValueError, TypeError) as error:
        raise UserError(str(error), key="grid", remedy=REMEDY) from error
    if not bool((grid.diff() < 0).all()):
        raise UserError(
            "gives a grid that repeats a time: its noise levels are too close to each other for "
            f"schedule={schedule.name}",
            key="steps",
            value=drawing.steps,
            remedy=REMEDY,
        )
    return grid


def _try(drawing: Drawing, schedule: Schedule, grid: Tensor) -> None:
    """Sample latents of zeros over the first two times of the grid, with an identity network."""
    zeros = torch.zeros(1, 1, 1, 1)

    def identity(x: Tensor, t: Tensor) -> Tensor:
        return x

    denoisers = {CONDITIONED: identity, UNCONDITIONED: identity, NOTHING: identity}
    guided = drawing.guidance(denoisers, drawing.guidance_scale, schedule)
    drawing.sampler(guided, zeros, grid[:2], schedule, lambda step: zeros)
