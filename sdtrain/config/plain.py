"""Values of sdtrain's own parts that are wrong whatever else is chosen, found without torch: the
constructors would find them ten seconds later, or after a first stage.
"""

from pathlib import Path
from typing import Any

from sdtrain.config.schema import at_least
from sdtrain.errors import UserError


def check_plain_values(config: dict) -> None:
    """Raises UserError, which names the key. What has the wrong type is left to the check of
    types.
    """
    if isinstance(config.get("steps"), int):
        at_least(config["steps"], 1, "steps")
    rate = config["optimizer"].get("lr")
    if isinstance(rate, int | float) and not rate >= 0:
        raise UserError("must be at least 0", key="optimizer.lr", value=rate)
    model = config["model"]
    _check_channels(model, "model")
    _check_channels(model.get("unet"), "model.unet")
    schedule = config.get("schedule")
    if isinstance(schedule, dict) and schedule.get("_target_") == "sdtrain.schedules.table.table":
        for name in ("betas", "alphas_cumprod"):
            _check_file(schedule.get(name), f"schedule.{name}")


def _check_channels(node: Any, key: str) -> None:
    """A network of ours has at least one resolution, and channels at each."""
    if not isinstance(node, dict) or not str(node.get("_target_")).startswith("sdtrain."):
        return
    channels = node.get("block_channels", [1])
    if isinstance(channels, list) and not all(isinstance(each, int) for each in channels):
        return
    if isinstance(channels, list) and (not channels or min(channels) < 1):
        raise UserError(
            "must be a list of at least one number, each at least 1",
            key=f"{key}.block_channels",
            value=channels,
        )


def _check_file(value: Any, key: str) -> None:
    if not isinstance(value, str):
        return
    path = Path(value).expanduser()
    if not path.exists() or path.is_dir():  # a pipe will do
        raise UserError("is no file", key=key, value=value, remedy=f"Change {key}.")
