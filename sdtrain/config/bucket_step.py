"""The keys of aspect-ratio buckets: fill in data.bucket_step, and refuse what does not fit.

Does not import torch.
"""

import math
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sdtrain.config.check import check_value
from sdtrain.config.pretrained import SIDES
from sdtrain.data.buckets import check_bucket_options, default_step
from sdtrain.errors import UserError
from sdtrain.models.pipeline_folder import read_json
from sdtrain.paths import find_folder

STEP = "data.bucket_step"

BUCKET_KEYS = ("buckets", "bucket_step", "bucket_max_ratio")
"""Keys under `data` that are about buckets."""


def fill_bucket_step(config: DictConfig) -> None:
    """Set data.bucket_step, if it is null, to one that suits the pictures and the model.

    Raises UserError for one that does not fit the autoencoder, and for a data.image_size for which
    none would. Does nothing without buckets.
    """
    data = config.get("data")
    if not isinstance(data, DictConfig) or data.get("buckets") is not True:
        return
    if "bucket_step" not in data or not isinstance(data.get("image_size"), int):
        return
    divisor = _divisor(config)
    step = data.bucket_step
    if data.image_size % divisor:
        raise UserError(
            f"must be a multiple of {divisor}, as the sides of this model's pictures are",
            key="data.image_size",
            value=data.image_size,
            remedy="Change data.image_size.",
        )
    if step is None:
        data.bucket_step = default_step(data.image_size, divisor, _unet_downsampling(config))
    elif isinstance(step, int) and step % divisor:
        raise UserError(
            f"must be a multiple of {divisor}, as the sides of this model's pictures are",
            key=STEP,
            value=step,
            remedy=f"Change {STEP}.",
        )


def _divisor(config: DictConfig) -> int:
    """Return what divides the sides of a picture; 1 if that is not known yet."""
    downsampling = OmegaConf.select(config, "model.autoencoder.downsampling")
    divisor = downsampling if isinstance(downsampling, int) and downsampling > 0 else 1
    if "pretrained" in (config.get("model") or {}):
        divisor = math.lcm(divisor, SIDES)
    return divisor


def _unet_downsampling(config: DictConfig) -> int:
    """Return by which factor the UNet reduces the sides of the latents; 1 if it is not known."""
    channels = OmegaConf.select(config, "model.unet.block_channels")
    architecture = OmegaConf.select(config, "model.unet.architecture")
    if architecture is not None:
        folder = find_folder(architecture, "model.unet.architecture")
        channels = read_json(folder / "config.json", str(folder)).get("block_out_channels")
    if not hasattr(channels, "__len__"):
        return 1
    return 2 ** max(0, len(channels) - 1)


def check_bucket_keys(data: dict[str, Any], typed: set[str], trains_autoencoder: bool) -> None:
    """Raise UserError for a key about buckets that has no effect, or a bad value.

    typed: the keys that the user typed. Data sets of the user's own are not checked.
    """
    if not str(data.get("_target_")).startswith("sdtrain."):
        return
    if trains_autoencoder and data.get("buckets"):
        raise UserError(
            "data.buckets has no effect when an autoencoder is trained, which reads squares",
            key="data.buckets",
            remedy="Remove it.",
        )
    if data.get("buckets") is True:
        values = {"image_size": int, "bucket_step": int | None, "bucket_max_ratio": float}
        for name, hint in values.items():
            check_value(data.get(name), hint, f"data.{name}")
        check_bucket_options(data["image_size"], data["bucket_step"], data["bucket_max_ratio"])
    elif "buckets" in data:
        for name in BUCKET_KEYS[1:]:
            if f"data.{name}" in typed:
                raise UserError(
                    f"data.{name} has no effect without data.buckets=true",
                    key=f"data.{name}",
                    remedy="Set data.buckets=true, or remove it.",
                )
