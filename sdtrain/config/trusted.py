"""What a configuration that was read from a file may build, and how to upgrade an old one.

A checkpoint may come from anybody. Its configuration may therefore build only sdtrain's own parts
and classes of packages that the user allows.
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
"""Path of a target in earlier versions -> its path today."""

ADDED_ARGUMENTS = {
    "sdtrain.data.images.Images": {
        "captions": "all",
        "shuffle_tags": False,
        "drop_tags": 0.0,
        "keep_tags": 0,
        "caption_template": None,
        "upscale": False,
        "buckets": False,
        "bucket_step": None,
        "bucket_max_ratio": 2.0,
        "depth": None,
        "depth_model": None,
        "prior": None,
        "prior_prompt": None,
        "prior_images": 200,
        "prior_weight": 1.0,
    },
    "sdtrain.data.dataset.StoredPictures": {"depth": None, "depth_model": None},
    "sdtrain.data.columns.Columns": {"depth": None},
    "sdtrain.config.schema.TrainerSettings": {"probe": False},
    "sdtrain.training.callbacks.sample_grid.SampleGrid": {"attention": 0},
    "torch.optim.AdamW": {"text_encoder_lr": None, "decay_norms_and_biases": True},
}
"""Target -> {argument that earlier versions lacked: the value that does what they did}."""

REMOVED_ARGUMENTS = {
    "sdtrain.training.callbacks.noise_level_validation.NoiseLevelValidation": ("share",),
}
"""Target -> arguments that earlier versions took and that it no longer takes."""

ROOMS = ("adapters", "schedules", "diffusion", "models", "conditioning", "data", "latent_diffusion")
"""Rooms of sdtrain whose classes a checkpoint's configuration may build; of `schedules` also the
functions.
"""


def upgrade_config(node: Any) -> Any:
    """Return a copy of a saved configuration as the present version would have written it.

    Moved targets get their present path, missing arguments the value that keeps the earlier
    behaviour, and removed arguments are dropped.
    """
    if isinstance(node, list):
        return [upgrade_config(value) for value in node]
    if not isinstance(node, dict):
        return node
    copy = {key: upgrade_config(value) for key, value in node.items()}
    target = copy.get("_target_")
    if isinstance(target, str):
        target = MOVED.get(target, target)
        copy["_target_"] = target
        copy = ADDED_ARGUMENTS.get(target, {}) | copy
        for argument in REMOVED_ARGUMENTS.get(target, ()):
            copy.pop(argument, None)
    return copy


def iterate_targets(node: Any) -> Iterator[str]:
    """Yield every _target_ in a node and below it."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield str(node["_target_"])
        for value in node.values():
            yield from iterate_targets(value)
    elif isinstance(node, list):
        for value in node:
            yield from iterate_targets(value)


def is_part_of_sdtrain(target: str) -> bool:
    """Whether `target` names a class of ROOMS, or a function of `schedules`.

    False for what these modules import, such as os.
    """
    rooms = tuple(f"sdtrain.{room}." for room in ROOMS)
    if not target.startswith(rooms):
        return False
    try:
        imported = get_object(target)
    except Exception:  # there is no such object
        return False
    module = f"{getattr(imported, '__module__', '')}."
    if not module.startswith(rooms):
        return False
    return inspect.isclass(imported) or module.startswith("sdtrain.schedules.")


def foreign_packages(node: Any) -> list[str]:
    """Return the packages besides sdtrain whose classes a node builds, as `allow` names them."""
    packages = {target.partition(".")[0] for target in iterate_targets(node)}
    return sorted(packages - {"sdtrain"})


def check_targets(node: Any, allow: Iterable[str]) -> None:
    """Raise UserError for a target that is neither a part of sdtrain nor of a package in `allow`.

    `sdtrain` in `allow` has no effect.
    """
    allowed = set(allow) - {"sdtrain"}
    for target in iterate_targets(node):
        package = target.partition(".")[0]
        if package in allowed or is_part_of_sdtrain(target):
            continue
        remedy = ""
        if package != "sdtrain":
            remedy = f"If you trust the package, add allow=[{package}]."
        raise UserError(
            f"The checkpoint's configuration names {target}, which is not a part of sdtrain",
            key="allow",
            remedy=remedy,
        )
