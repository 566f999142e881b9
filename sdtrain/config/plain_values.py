"""Checks, without torch, of values that are wrong whatever else is chosen.

The constructors of sdtrain's own parts would find them too, but ten seconds later or even after a
first stage.
"""

from pathlib import Path
from typing import Any

from sdtrain.config.schema import check_at_least
from sdtrain.errors import UserError


def check_plain_values(config: dict) -> None:
    """Raise UserError, which names the key, for a wrong value.

    Values of a wrong type are ignored here: the check of types reports them.
    """
    if isinstance(config.get("steps"), int):
        check_at_least(config["steps"], 1, "steps")
    learning_rate = config["optimizer"].get("lr")
    if isinstance(learning_rate, int | float) and not learning_rate >= 0:
        raise UserError("must be at least 0", key="optimizer.lr", value=learning_rate)
    model = config["model"]
    _check_channels(model, "model")
    _check_channels(model.get("unet"), "model.unet")
    schedule = config.get("schedule")
    if isinstance(schedule, dict) and schedule.get("_target_") == "sdtrain.schedules.table.table":
        for name in ("betas", "alphas_cumprod"):
            _check_file(schedule.get(name), f"schedule.{name}")


def _check_channels(node: Any, key: str) -> None:
    """Require at least one resolution with at least one channel each, in sdtrain's own networks."""
    if not isinstance(node, dict) or not str(node.get("_target_")).startswith("sdtrain."):
        return
    channels = node.get("block_channels", [1])
    if not isinstance(channels, list) or not all(isinstance(each, int) for each in channels):
        return
    if not channels or min(channels) < 1:
        raise UserError(
            "must be a list of at least one number, each at least 1",
            key=f"{key}.block_channels",
            value=channels,
        )


def _check_file(value: Any, key: str) -> None:
    if not isinstance(value, str):
        return
    path = Path(value).expanduser()
    if not path.exists() or path.is_dir():  # not is_file(): a pipe is allowed
        raise UserError("is not a file", key=key, value=value, remedy=f"Change {key}.")
