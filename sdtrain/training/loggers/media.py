"""Builds and closes the logger, and logs pictures, histograms and tables.

What a logger does not support is not logged: the run's folder has it.
"""

import os
from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import OmegaConf
from PIL import Image

from sdtrain.config.build import build
from sdtrain.config.check import import_target
from sdtrain.redaction import redacted
from sdtrain.runs.layout import CheckpointFolder, RunFolder
from sdtrain.runs.manifest import list_checkpoints
from sdtrain.training.loggers.local import check_tensorboard, tensorboard
from sdtrain.training.loggers.wandb import GuardedWandb, own_data_dir, wandb
from sdtrain.training.loggers.wandb_variables import with_variables


def check_logger(node: dict | None, typed: Collection[str]) -> None:
    """Raise UserError if the logger cannot work, without building it."""
    settings = with_environment(node, typed)
    if settings and import_target(settings, "logger") is tensorboard:
        check_tensorboard()


def make_logger(
    config: dict, typed: Collection[str], folder: RunFolder, saved: str, resumed: int
) -> Logger | None:
    """Build the logger that the configuration names; None if it names none.

    typed: keys that the user typed on the command line. saved: the run's yaml, which is logged as
    its hyperparameters. resumed: images seen at the checkpoint that the run resumes from, else 0.
    """
    node = with_environment(config.get("logger"), typed)
    if not node:
        return None
    name = redacted(f"{config['name']}/{folder.name}")
    logger = build(node, "logger", run_dir=folder.path, name=name, resumed=resumed)
    if logger is not None:
        logger.log_hyperparams(OmegaConf.to_container(OmegaConf.create(saved)))
    return logger


def with_environment(node: dict | None, typed: Collection[str]) -> dict | None:
    """Return the logger's node, for wandb with the values of its environment variables.

    typed: the keys on the command line, which come first.
    """
    if node and import_target(node, "logger") is wandb:
        return with_variables(node, typed)
    return node


@rank_zero_only
def close_logger(logger: Logger, *, failed: bool) -> None:
    """Finish the logger, so that the next run of a sweep starts its own."""
    if not failed:  # otherwise Lightning has finalized it
        logger.finalize("success")
    if isinstance(logger, GuardedWandb):
        saved = list_checkpoints(Path(logger.save_dir))
        if logger.uploads_checkpoint and saved and not failed:
            logger.log_checkpoint(CheckpointFolder(saved[-1]))
        logger.finish(failed)
        if os.environ.get("WANDB_DATA_DIR") == own_data_dir(logger.save_dir):
            del os.environ["WANDB_DATA_DIR"]


def log_picture(logger: Logger, key: str, picture: Image.Image, images_seen: int) -> None:
    """Log a picture, if the logger supports pictures."""
    if isinstance(logger, GuardedWandb):
        import wandb

        logger.log_guarded(lambda: {key: wandb.Image(picture)}, images_seen)
    elif isinstance(logger, TensorBoardLogger):
        pixels = torch.from_numpy(np.array(picture))
        logger.experiment.add_image(key, pixels, images_seen, dataformats="HWC")


def log_levels(
    logger: Logger, lists: dict[str, list], edges: list[float], images_seen: int
) -> None:
    """Log values by bin of log_snr, such as the mean loss, as histograms.

    lists: {key: [bins]}. edges: [bins + 1], the edges of the bins.
    """
    if not isinstance(logger, GuardedWandb):
        return
    import wandb

    histograms = {}
    for key, values in lists.items():
        heights = np.array([value or 0.0 for value in values])
        histograms[key] = wandb.Histogram(np_histogram=(heights, np.array(edges)))
    logger.log_guarded(lambda: histograms, images_seen)


def log_table(
    logger: Logger, key: str, columns: list[str], rows: list[list], images_seen: int
) -> None:
    """Log a table to wandb; cells that are [H, W, 3] uint8 arrays are shown as pictures.

    The last cell of each row is a picture, which is also logged by itself: offline, wandb keeps the
    pictures of a table only for the upload, where neither `wandb leet` nor people find them.
    """
    if not isinstance(logger, GuardedWandb):
        return
    import wandb

    def as_wandb(cell):
        return wandb.Image(cell) if isinstance(cell, np.ndarray) else cell

    def make_table() -> dict:
        data = []
        images = []
        for row in rows:
            data.append([as_wandb(cell) for cell in row])
            caption = ", ".join(str(cell) for cell in row[1:-1])
            images.append(wandb.Image(row[-1], caption=caption))
        return {key: wandb.Table(columns=columns, data=data), f"{key}_pictures": images}

    logger.log_guarded(make_table, images_seen)
