"""What a configuration that was read from a file may build, and what its targets are called today.

A checkpoint may come from anybody: its configuration builds sdtrain's own parts only, and packages
that the user names.
"""

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

from hydra.utils import get_object

from sdtrain.errors import UserError

MOVED = {
    "sdtrain.module.DiffusionModule": "sdtrain.latent_diffusion.LatentDiffusion",
    "sdtrain.autoencoder_module.AutoencoderModule": (
        "sdtrain.training.autoencoder_module.AutoencoderModule"
    ),
    "sdtrain.optimisation.Cosine": "sdtrain.training.optimisation.Cosine",
    "sdtrain.optimisation.Constant": "sdtrain.training.optimisation.Constant",
    "sdtrain.cli.trainer.TrainerSettings": "sdtrain.config.schema.TrainerSettings",
    "sdtrain.cli.trainer.single": "sdtrain.training.trainer.single",
    "sdtrain.cli.trainer.ddp": "sdtrain.training.trainer.ddp",
    "sdtrain.callbacks.ema.EMACallback": "sdtrain.training.callbacks.ema.EMACallback",
    "sdtrain.callbacks.noise_level_validation.NoiseLevelValidation": (
        "sdtrain.training.callbacks.noise_level_validation.NoiseLevelValidation"
    ),
    "sdtrain.callbacks.sample_grid.SampleGrid": "sdtrain.training.callbacks.sample_grid.SampleGrid",
    "sdtrain.callbacks.reconstructions.Reconstructions": (
        "sdtrain.training.callbacks.reconstructions.Reconstructions"
    ),
    "sdtrain.callbacks.validation.Validation": "sdtrain.training.callbacks.validation.Validation",
    "sdtrain.callbacks.loggers.wandb": "sdtrain.training.loggers.wandb.wandb",
    "sdtrain.callbacks.loggers.csv": "sdtrain.training.loggers.local.csv",
    "sdtrain.callbacks.loggers.tensorboard": "sdtrain.training.loggers.local.tensorboard",
}
"""Targets as earlier versions wrote them, and what they are called now."""

TAKEN_ON = {
    "sdtrain.data.images.Images": {
        "captions": "all",
        "shuffle_tags": False,
        "drop_tags": 0.0,
        "keep_tags": 0,
        "upscale": False,
    },
}
"""Keys that earlier versions did not know, by target, and what those versions did."""

REMOVED = {
    "sdtrain.training.callbacks.noise_level_validation.NoiseLevelValidation": ("share",),
}
"""Arguments that earlier versions wrote for a target, and that it takes no more."""

ROOMS = ("schedules", "diffusion", "models", "conditioning", "data", "latent_diffusion")
"""Rooms of sdtrain whose classes a checkpoint's configuration may build; of `schedules` its
functions too.
"""


def renewed(node: Any) -> Any:
    """A copy of a saved configuration in which every moved target has its present name, every key
    that was taken on since then what was done without it, and none that it takes no more.
    """
    if isinstance(node, dict):
        copy = {key: renewed(value) for key, value in node.items()}
        target = copy.get("_target_")
        if isinstance(target, str):
            copy["_target_"] = MOVED.get(target, target)
            copy = TAKEN_ON.get(copy["_target_"], {}) | copy
            for key in REMOVED.get(copy["_target_"], ()):
                copy.pop(key, None)
        return copy
    if isinstance(node, list):
        return [renewed(value) for value in node]
    return node


def targets(node: Any) -> Iterator[str]:
    """Every _target_ in a node and below it."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield str(node["_target_"])
        for value in node.values():
            yield from targets(value)
    elif isinstance(node, list):
        for value in node:
            yield from targets(value)


def is_ours(target: str) -> bool:
    """Whether `target` names a class of ROOMS, or a function that makes a schedule: not what they
    import, such as os.
    """
    rooms = tuple(f"sdtrain.{room}." for room in ROOMS)
    if not target.startswith(rooms):
        return False
    try:
        found = get_object(target)
    except Exception:  # it names nothing
        return False
    home = f"{getattr(found, '__module__', '')}."
    if not home.startswith(rooms):
        return False
    return inspect.isclass(found) or home.startswith("sdtrain.schedules.")


def check_targets(node: Any, allow: Iterable[str]) -> None:
    """Raises UserError for a target that is neither ours nor of a package in `allow`."""
    allowed = set(allow) - {"sdtrain"}
    for target in targets(node):
        package = target.partition(".")[0]
        if package in allowed or is_ours(target):
            continue
        trust = f"If you trust the package, add allow=[{package}]." if package != "sdtrain" else ""
        raise UserError(
            f"The checkpoint wants to build {target}, which is not a part that sdtrain builds",
            key="allow",
            remedy=trust,
        )
