"""Loggers are made and closed here, and given pictures, histograms and tables.

What a logger cannot show is left out: the run's folder has it.
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
from sdtrain.config.check import target_of
from sdtrain.redaction import redacted
from sdtrain.runs.layout import CheckpointFolder, RunFolder
from sdtrain.runs.manifest import published
from sdtrain.training.loggers.local import check_tensorboard, tensorboard
from sdtrain.training.loggers.wandb import GuardedWandb, own_data_dir, wandb
from sdtrain.training.loggers.wandb_variables import with_variables


def check_logger(node: dict | None, typed: Collection[str]) -> None:
    """Raises UserError where a logger lacks what it needs. It makes nothing."""
    settled = _settled(node, typed)
    if settled and target_of(settled, "logger") is tensorboard:
        check_tensorboard()


def make_logger(
    config: dict, typed: Collection[str], folder: RunFolder, saved: str, resumed: int
) -> Logger | None:
    """The logger that the configuration names, or None.

    typed: the keys that the user typed. saved: the run's yaml, which is logged as its
    hyperparameters. resumed: images seen at the checkpoint that the run goes on from.
    """
    node = _settled(config.get("logger"), typed)
    if not node:
        return None
    name = redacted(f"{config['name']}/{folder.name}")
    logger = build(node, "logger", run_dir=folder.path, name=name, resumed=resumed)
    if logger is not None:
        logger.log_hyperparams(OmegaConf.to_container(OmegaConf.create(saved)))
    return logger


def _settled(node: dict | None, typed: Collection[str]) -> dict | None:
    """The logger's node, wandb's with what its environment variables say."""
    if node and target_of(node, "logger") is wandb:
        return with_variables(node, typed)
    return node


@rank_zero_only
def close_logger(logger: Logger, *, failed: bool) -> None:
    """Ends the logger's run: the next one of a sweep starts its own."""
    if not failed:  # otherwise Lightning has done it
        logger.finalize("success")
    if isinstance(logger, GuardedWandb):
        saved = published(Path(logger.save_dir))
        if logger.uploads_checkpoint and saved and not failed:
            logger.log_checkpoint(CheckpointFolder(saved[-1]))
        logger.finish(failed)
        if os.environ.get("WANDB_DATA_DIR") == own_data_dir(logger.save_dir):
            del os.environ["WANDB_DATA_DIR"]


def log_picture(logger: Logger, key: str, picture: Image.Image, images_seen: int) -> None:
    """Logs a picture, where the logger takes pictures."""
    if isinstance(logger, GuardedWandb):
        import wandb

        logger.log_guarded(lambda: {key: wandb.Image(picture)}, images_seen)
    elif isinstance(logger, TensorBoardLogger):
        pixels = torch.from_numpy(np.array(picture))
        logger.experiment.add_image(key, pixels, images_seen, dataformats="HWC")


def log_levels(
    logger: Logger, lists: dict[str, list], edges: list[float], images_seen: int
) -> None:
    """Logs the number of samples and the mean loss by noise level, as histograms over log_snr."""
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
    """Logs a table to wandb; cells that are pictures ([H, W, 3] uint8 arrays) are shown as such.

    Offline, wandb keeps the table's pictures for the upload alone; so each is logged by itself too,
    where `wandb leet` and people find it.
    """
    if not isinstance(logger, GuardedWandb):
        return
    import wandb

    def cell_shown(cell):
        return wandb.Image(cell) if isinstance(cell, np.ndarray) else cell

    def table() -> dict:
        data = []
        for row in rows:
            data.append([cell_shown(cell) for cell in row])
        single = []
        for row in rows:
            caption = ", ".join(str(cell) for cell in row[1:-1])
            single.append(wandb.Image(row[-1], caption=caption))
        return {key: wandb.Table(columns=columns, data=data), f"{key}_pictures": single}

    logger.log_guarded(table, images_seen)
