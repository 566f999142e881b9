"""Lightning's Trainer as sdtrain needs it, and the strategies."""

import math
from datetime import timedelta
from pathlib import Path

import lightning.pytorch as L
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy

from sdtrain.config.schema import TrainerSettings, at_least
from sdtrain.errors import UserError
from sdtrain.training.checkpoint_io import FolderIO
from sdtrain.training.stopping import disable_lightning_signals

COLLECTIVES_WAIT = 60
"""Seconds by which collectives give up later than the thread that watches the ranks, which can say
more.
"""


def single() -> str:
    """One process on one device."""
    return "auto"


def ddp(*, timeout: int) -> DDPStrategy:
    """One process per device with the same weights; gradients are averaged.

    timeout: seconds that a step may take, see sdtrain.training.ranks.
    """
    at_least(timeout, 1, "strategy.timeout")
    limit = timedelta(seconds=timeout + COLLECTIVES_WAIT)
    return DDPStrategy(timeout=limit, gradient_as_bucket_view=True)


def check_devices(settings: TrainerSettings) -> None:
    """Raises UserError where this machine lacks the devices. A sweep may be started on another."""
    found = torch.cuda.device_count()
    if settings.accelerator == "gpu" and found < settings.devices:
        raise UserError(
            f"trainer.accelerator=gpu with trainer.devices={settings.devices}, "
            f"but this machine has {found} GPUs",
            key="trainer.devices",
            remedy="Set trainer.accelerator=auto or another trainer.devices.",
        )


def make_trainer(
    settings: TrainerSettings,
    *,
    strategy: str | DDPStrategy,
    batch_size: int,
    logger: Logger | None,
    callbacks: list[L.Callback],
    run_dir: Path,
    checkpoint_io: FolderIO,
) -> L.Trainer:
    """Validation, checkpoints, progress bar and signals are ours: Lightning's are off."""
    trainer = L.Trainer(
        accelerator=settings.accelerator,
        devices=settings.devices,
        precision=settings.precision,
        deterministic=settings.deterministic,
        strategy=strategy,
        max_steps=math.ceil(settings.max_images / batch_size),
        max_epochs=-1,
        accumulate_grad_batches=settings.accumulate,
        logger=[logger] if logger else [],
        callbacks=callbacks,
        plugins=[checkpoint_io],
        default_root_dir=run_dir,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        log_every_n_steps=1,
    )
    disable_lightning_signals(trainer)
    return trainer
