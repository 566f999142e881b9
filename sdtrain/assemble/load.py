"""A trained model out of a run's checkpoint. What its configuration names is checked before
anything of it is imported.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from sdtrain.assemble.model import build_data, build_model
from sdtrain.config.draft import is_autoencoder
from sdtrain.config.trusted import check_targets, renewed
from sdtrain.errors import StorageError, UserError
from sdtrain.latent_diffusion import LatentDiffusion
from sdtrain.runs.checkpoint import read_weights
from sdtrain.runs.config import read_config
from sdtrain.runs.layout import CheckpointFolder
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
)
"""What is built of a checkpoint's configuration; nothing else of it is kept."""

READ = ("seed", "guidance_scale")
"""Plain values that are read from it."""


@dataclass
class Loaded:
    """A run's model with the weights asked for, and its configuration. checkpoint: the folder they
    were read from.
    """

    model: LatentDiffusion
    cfg: dict[str, Any]
    checkpoint: CheckpointFolder

    @cached_property
    def data(self) -> PictureData:
        """The data set that the run was trained on, made when it is asked for: drawing a picture
        does not need it.
        """
        return build_data(self.cfg["data"])

    @property
    def image_size(self) -> int:
        return self.cfg["data"].get("image_size") or self.data.image_size


def load(
    folder: CheckpointFolder, *, ema: bool, device: str, allow: list[str], autoencoder: str | None
) -> Loaded:
    """The model of a checkpoint that `find_checkpoint` has found whole. Raises UserError where it
    holds none that draws.

    ema: averaged weights. allow: packages that its configuration may build from. autoencoder: where
    that has moved to.
    """
    saved = renewed(read_config(folder.config))
    if is_autoencoder(saved):
        raise UserError(
            "is an autoencoder's run: it draws nothing by itself",
            key="checkpoint",
            value=str(folder.path),
            remedy="Give the run of a diffusion model in checkpoint.",
        )
    for key in ("model", "schedule"):
        if not saved.get(key):
            raise StorageError(
                f"{folder.config} has no {key}: it is no diffusion model's",
                key="checkpoint",
                remedy="Give the run of a diffusion model in checkpoint.",
            )
    check_targets({key: saved.get(key) for key in BUILT}, allow)
    cfg = {key: value for key, value in saved.items() if key in (*BUILT, *READ)}
    if autoencoder is not None:
        cfg["model"]["autoencoder"]["path"] = autoencoder
    model = build_model(cfg, folder.run.path)
    weights = read_weights(folder.path, "model")
    if ema:
        weights |= model.under_all_names(_average(folder))
    model.load_trained_state(weights)
    return Loaded(model.to(device).eval(), cfg, folder)


def _average(folder: CheckpointFolder) -> dict[str, torch.Tensor]:
    average = read_weights(folder.path, "ema")
    if average is None:
        raise UserError(
            f"checkpoint={folder.path} has no averaged weights: "
            "it was trained without callbacks.ema",
            key="ema",
            remedy="Set ema=false.",
        )
    return average


def pick_device(accelerator: str) -> str:
    """auto, cpu or gpu to torch's word. UserError where the machine has none."""
    has_gpu = torch.cuda.is_available()
    if accelerator == "gpu" and not has_gpu:
        raise UserError(
            "is not possible: this machine has none",
            key="accelerator",
            value="gpu",
            remedy="Set accelerator=auto.",
        )
    return "cuda" if has_gpu and accelerator != "cpu" else "cpu"
