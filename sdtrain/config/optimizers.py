"""What an optimizer needs beside it: a package, or other options. Needs no torch."""

import importlib.util
from typing import Any

from sdtrain.errors import UserError, first_line

PREFIX = "sdtrain.training.optimizers."
PACKAGES = {"adamw_8bit": "bitsandbytes", "schedule_free": "schedulefree"}
"""{option of the group optimizer: the package that it needs}."""
EXTRAS = {"adamw_8bit": "8bit", "schedule_free": "schedule_free"}
"""{option: the extra of sdtrain that installs its package}."""


def is_schedule_free(config: dict[str, Any]) -> bool:
    """Whether a training configuration, new or saved, uses the schedule-free optimizer: the
    weights in its checkpoints are averages.
    """
    return _option(config.get("optimizer")) == "schedule_free"


def missing_package(option: str, reason: object = "it is not installed") -> UserError:
    """Return the error to raise if the package of an optimizer cannot be imported."""
    return UserError(
        f"optimizer={option} needs the package {PACKAGES[option]}: {first_line(reason)}",
        key="optimizer",
        remedy=f"Install it with pip install 'sdtrain[{EXTRAS[option]}]', or choose "
        "optimizer=adamw.",
    )


def check_optimizer_options(config: dict[str, Any]) -> None:
    """Raise UserError if the package of the optimizer is not installed, or if an option beside it
    would average its weights or lower its learning rate a second time.
    """
    option = _option(config.get("optimizer"))
    if option in PACKAGES and importlib.util.find_spec(PACKAGES[option]) is None:
        raise missing_package(option)
    if option != "schedule_free":
        return
    if (config.get("callbacks") or {}).get("ema"):
        raise UserError(
            "callbacks.ema has no use with optimizer=schedule_free, which averages the weights "
            "itself",
            key="callbacks.ema",
            remedy="Set callbacks.ema=null.",
        )
    if str(config["lr_schedule"].get("_target_")).endswith(".Cosine"):
        raise UserError(
            "lr_schedule=cosine lowers the learning rate, which optimizer=schedule_free replaces "
            "by its average",
            key="lr_schedule",
            remedy="Set lr_schedule=constant.",
        )


def _option(node: Any) -> str | None:
    """Return which of sdtrain's own optimizers a node builds; None for any other."""
    target = str(node.get("_target_")) if isinstance(node, dict) else ""
    if not target.startswith(PREFIX):
        return None
    return target.removeprefix(PREFIX).partition(".")[0]
