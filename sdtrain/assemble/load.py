"""A trained model out of a run's checkpoint. What its config names is checked before anything of it is imported."""

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_object

from sdtrain.assemble.model import build_data, build_diffusion
from sdtrain.errors import UserError
from sdtrain.runs.checkpoint import find_checkpoint, read_config, read_weights
from sdtrain.training.diffusion_module import DiffusionModule
from sdtrain.types import PictureData

BUILT = (
    "data",
    "model",
    "schedule",
    "modifiers",
    "prediction",
    "weighting",
    "loss",
    "times",
)  # what is built of a checkpoint's configuration
READ = ("seed", "guidance_scale")


@dataclass
class Loaded:
    """A run's model with the weights asked for, its data set and its configuration."""

    module: DiffusionModule
    data: PictureData
    cfg: dict[str, Any]
    run_dir: Path
    folder: Path


def targets(node: Any):
    if isinstance(node, dict):
        if "_target_" in node:
            yield str(node["_target_"])
        for value in node.values():
            yield from targets(value)
    elif isinstance(node, list):
        for value in node:
            yield from targets(value)


ROOMS = ("schedules", "diffusion", "models", "conditioning", "data", "module")


def is_ours(target: str) -> bool:
    """Whether `target` names a class of our rooms, or one of the functions that make schedules: not what our modules import, such as os."""
    if not target.startswith(tuple(f"sdtrain.{room}." for room in ROOMS)):
        return False
    try:
        found = get_object(target)
    except Exception:  # it names nothing
        return False
    ours = getattr(found, "__module__", "").startswith(tuple(f"sdtrain.{room}" for room in ROOMS))
    return ours and (inspect.isclass(found) or found.__module__.startswith("sdtrain.schedules"))


def check_targets(cfg: dict, allow: list[str]) -> None:
    """A configuration from a checkpoint may come from anybody: it may build what is ours, and packages that the user names."""
    for target in targets({key: cfg.get(key) for key in BUILT}):
        package = target.partition(".")[0]
        if package in allow and package != "sdtrain" or is_ours(target):
            continue
        trust = f" If you trust the package, add allow=[{package}]." if package != "sdtrain" else ""
        raise UserError(
            f"The checkpoint wants to build {target}, which is not a part that sdtrain builds.{trust}"
        )


def load(
    checkpoint: str, *, ema: bool, device: str, allow: list[str], autoencoder: str | None
) -> Loaded:
    """The model of `checkpoint`, a run or one checkpoint of it. UserError where that is none."""
    folder = find_checkpoint(Path(checkpoint))
    run_dir = folder.parent.parent
    cfg = read_config(folder)
    if not cfg.get("schedule"):
        raise UserError(
            f"checkpoint={checkpoint} is an autoencoder's run: it draws nothing by itself. Give the run of a diffusion model in checkpoint."
        )
    cfg = {
        key: value for key, value in cfg.items() if key in (*BUILT, *READ)
    }  # nothing else can be built, because nothing else is there
    check_targets(cfg, allow)
    if autoencoder is not None:
        cfg["model"]["autoencoder"]["path"] = autoencoder
    module = build_diffusion(cfg, run_dir)
    weights = read_weights(folder, "model")
    if ema:
        average = read_weights(folder, "ema")
        if average is None:
            raise UserError(
                f"checkpoint={checkpoint} has no averaged weights: it was trained without callbacks.ema. Set ema=false."
            )
        weights |= average
    module.load_state_dict(weights)
    return Loaded(module.to(device).eval(), build_data(cfg["data"]), cfg, run_dir, folder)


def pick_device(accelerator: str) -> str:
    """auto, cpu or gpu to torch's word. UserError where the machine has none."""
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError("accelerator=gpu: this machine has none. Set accelerator=auto.")
    return "cpu" if accelerator == "cpu" or not torch.cuda.is_available() else "cuda"
