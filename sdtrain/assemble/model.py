"""Configuration to objects. The only place that instantiates."""

import functools
import inspect
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from sdtrain.conditioning.class_label import ClassLabel
from sdtrain.conditioning.text import Text
from sdtrain.config.check import check, check_value, target_of
from sdtrain.diffusion import Density, Objective, WeightingError
from sdtrain.errors import UserError
from sdtrain.generation.generate import Drawing
from sdtrain.models.autoencoder import Autoencoder
from sdtrain.randomness import philox_key
from sdtrain.schedules import Schedule
from sdtrain.schedules.table import read
from sdtrain.training.diffusion_module import DiffusionModule
from sdtrain.types import PictureData

LOADER = {
    "batch_size": int,
    "num_workers": int,
}  # keys under data that the loader reads, whatever the data set
FILLED_IN = {  # arguments that sdtrain gives itself
    "objective",
    "optimisation",
    "drawing",
    "data",
    "run_dir",
    "name",
    "ema",
    "metrics_log",
    "density",
    "schedule",
    "conditional",
    "unconditional",
    "guidance_scale",
    "resumed",
}


def build(node: Any, key: str, **given: Any) -> Any:
    """Calls a node's _target_ with its arguments, built first, and with those of `given` that it takes. UserError names the key."""
    if isinstance(node, list):
        return [build(item, f"{key}[{place}]") for place, item in enumerate(node)]
    if not isinstance(node, dict):
        return node
    arguments = {
        name: build(value, f"{key}.{name}")
        for name, value in node.items()
        if name not in ("_target_", "_partial_")
    }
    if "_target_" not in node:
        return arguments
    target = target_of(node, key)
    parameters = inspect.signature(target).parameters
    arguments |= {name: value for name, value in given.items() if name in parameters}
    if node.get("_partial_"):
        return functools.partial(target, **arguments)
    try:
        return target(**arguments)
    except UserError:
        raise
    except (ValueError, TypeError, ArithmeticError) as error:
        raise UserError(
            str(error) if str(error).startswith(f"{key}.") else f"{key}: {error}"
        ) from error


@dataclass
class FirstStage:
    """The experiment that trains the autoencoder, and its length."""

    experiment: str
    max_images: int


def root(
    *,
    name: str,
    seed: int,
    data: object,
    model: object,
    optimizer: object,
    lr_schedule: object,
    trainer: object,
    strategy: object,
    checkpoint: dict,
    resume: Literal["never", "auto", "must"],
    resume_allow: list[str],
    schedule: object = None,
    modifiers: dict | None = None,
    prediction: object = None,
    weighting: object = None,
    loss: object = None,
    times: object = None,
    noise: object = None,
    sampler: object = None,
    grid: object = None,
    guidance: object = None,
    steps: int = 30,
    guidance_scale: float = 1.0,
    callbacks: dict | None = None,
    validation: object = None,
    logger: object = None,
    first_stage: FirstStage | None = None,
) -> None:
    """The schema of the configuration's root: its keys are checked as a call of this function."""


def check_all(cfg: dict, typed: set[str]) -> list[str]:
    """Checks every node below the root against its constructor. Returns notes to print."""
    notes = []
    for name, node in cfg.items():
        if name == "data":
            for loader_key, kind in LOADER.items():
                if loader_key not in node:
                    raise UserError(f"data.{loader_key} is missing. Set +data.{loader_key}=...")
                check_value(node[loader_key], kind, f"data.{loader_key}")
                if node[loader_key] < (1 if loader_key == "batch_size" else 0):
                    raise UserError(f"data.{loader_key}={node[loader_key]} is too small.")
            if "data.max_skipped" in typed and node.get("on_error") == "fail":
                raise UserError(
                    "data.max_skipped has no effect with data.on_error=fail, which leaves none out. Set data.on_error=skip, or remove it."
                )
            node = {k: v for k, v in node.items() if k not in LOADER}
        notes += check(node, name, FILLED_IN, typed, beside=LOADER if name == "data" else ())
    return notes


def build_data(node: dict) -> PictureData:
    """The data set; a saved configuration also holds the hash of its rows, which is no argument."""
    return build(
        {name: value for name, value in node.items() if name not in (*LOADER, "sha256")}, "data"
    )


def seed_weights(seed: int, purpose: str) -> None:
    """Initial weights are keyed by purpose: a change of the unet leaves the text encoder's as they were."""
    torch.manual_seed(int(philox_key(seed, f"weights/{purpose}")[0] >> 1))


def build_autoencoder(cfg: dict, run_dir: Path) -> torch.nn.Module:
    """The frozen autoencoder; a relative path is first looked for in the run's own folder, where a first stage leaves it."""
    node = dict(cfg["model"]["autoencoder"])
    if isinstance(node.get("path"), str) and (run_dir / node["path"]).is_dir():
        node["path"] = str(run_dir / node["path"])
    return build(node, "model.autoencoder")


def build_schedule(cfg: dict) -> Schedule:
    """The schedule with its modifiers, in the order in which they stand."""
    schedule = build(cfg["schedule"], "schedule")
    for name, node in (cfg.get("modifiers") or {}).items():
        if "_target_" not in node:
            raise UserError(f"modifiers.{name} is not chosen. Set modifiers=[{name}].")
        schedule = build(node, f"modifiers.{name}")(schedule)
    return schedule


def take_in_table(node: dict) -> None:
    """A table that lies in a file is read into the configuration, so that a run does not depend on the file."""
    for name in ("betas", "alphas_cumprod"):
        if node["_target_"] == "sdtrain.schedules.table.table" and isinstance(node.get(name), str):
            node[name] = read(node[name], f"schedule.{name}")


def build_objective(cfg: dict) -> Objective:
    """Raises UserError for whatever cannot be trained; no weight is needed for that."""
    schedule, times = build_schedule(cfg), build(cfg["times"], "times")
    weighting = build(cfg["weighting"], "weighting", density=Density(schedule, times))
    loss = build(cfg["loss"], "loss") if cfg.get("loss") else None
    return Objective(
        schedule=schedule,
        prediction=build(cfg["prediction"], "prediction"),
        weighting=weighting,
        times=times,
        loss=loss,
    )


def fitting_objective(cfg: dict, typed: set[str], notes: list[str]) -> Objective:
    """A weighting that an experiment brought along, and that cannot serve what the user typed, makes way, with a note; one that was typed
    is refused."""
    try:
        return build_objective(cfg)
    except WeightingError as refusal:
        if any(key.partition(".")[0] == "weighting" for key in typed):
            raise
        cfg["weighting"] = {"_target_": "sdtrain.diffusion.weighting.simple.Simple"}
        notes.append(f"weighting=simple is used: {str(refusal).partition('. ')[0]}.")
        return build_objective(cfg)


def build_diffusion(cfg: dict, run_dir: Path, optimisation=None) -> DiffusionModule:
    """The module with its initial weights; optimisation None where it will not be trained."""
    objective = build_objective(cfg)
    parts = {"autoencoder": build_autoencoder(cfg, run_dir)}
    for part in ("conditioner", "unet"):
        seed_weights(cfg["seed"], part)
        parts[part] = build(cfg["model"][part], f"model.{part}")
    rest = {name: value for name, value in cfg["model"].items() if name not in parts}
    return build(rest | parts, "model", objective=objective, optimisation=optimisation)


def check_fit(module: DiffusionModule, data: PictureData) -> None:
    """Whether data, conditioner and unet fit together, before any time is spent."""
    if (
        isinstance(module.conditioner, ClassLabel)
        and module.conditioner.num_classes < data.num_classes
    ):
        has, needs = module.conditioner.num_classes, data.num_classes
        raise UserError(
            f"model.conditioner.num_classes={has}, but the data have {needs} classes. Set model.conditioner.num_classes={needs}."
        )
    shape = module.autoencoder.latent_shape(data.image_size)
    x, timestep = torch.zeros(2, *shape), torch.zeros(2)
    with torch.no_grad():
        context = module.conditioner(
            ["", ""], torch.zeros(2, dtype=torch.long), torch.zeros(2, dtype=torch.bool)
        ).context
        try:
            output = module.unet(x, timestep, context)
        except Exception as error:  # the user's own network, or sizes that do not fit
            raise UserError(
                f"model.unet cannot take x {list(x.shape)}, timestep [2] and context {list(context.shape)} ({type(error).__name__}: {first_line(error)}). "
                f"Change model.unet, data.image_size or model.conditioner.context_dim."
            ) from error
    if getattr(output, "shape", None) != x.shape:
        returned = list(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        raise UserError(
            f"model.unet must return a tensor of x's shape {list(x.shape)}; it returned {returned}. Change model.unet."
        )


def cut_captions(module: DiffusionModule, data: PictureData) -> str | None:
    """A line that counts the training captions of which the conditioner reads only the beginning."""
    captions = getattr(
        data.split("train"), "captions", None
    )  # drawn data have none in store, and theirs are short
    if (
        not captions
        or not isinstance(module.conditioner, Text)
        or not (cut := module.conditioner.cut(captions))
    ):
        return None
    most = module.conditioner.max_length
    return f"{cut} of {len(captions)} captions have more than model.conditioner.max_length={most} tokens: of those the first {most - 2} are read."


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def build_drawing(cfg: dict, schedule: Schedule) -> Drawing:
    """Sampler, grid, steps and guidance, tried on two steps of nothing: what they refuse is said now and not after hours."""
    if not math.isfinite(cfg["guidance_scale"]):
        raise UserError(f"guidance_scale={cfg['guidance_scale']} must be a number.")
    parts = {name: build(cfg[name], name) for name in ("sampler", "grid", "guidance")}
    drawing = Drawing(
        **parts,
        steps=cfg["steps"],
        guidance_scale=cfg["guidance_scale"],
        batch_size=cfg.get("batch_size", 64),
    )
    nothing, identity = torch.zeros(1, 1, 1, 1), lambda x, t: x
    try:
        guided = drawing.guidance(identity, identity, drawing.guidance_scale, schedule)
        grid = drawing.grid(drawing.steps, schedule)
        if not bool((grid.diff() < 0).all()):
            raise ValueError(
                f"steps={drawing.steps}: the grid visits a time twice, its levels lie too close for schedule={schedule.name}"
            )
        drawing.sampler(guided, nothing, grid[:2], schedule, lambda step: nothing)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{str(error).rstrip('.')}. Change sampler, grid, steps or guidance."
        ) from error
    return drawing


def weights_hash(module: DiffusionModule) -> str | None:
    return module.autoencoder.sha256 if isinstance(module.autoencoder, Autoencoder) else None
