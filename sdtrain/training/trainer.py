"""Lightning's Trainer as sdtrain needs it, and the strategies."""

import math
from datetime import timedelta
from pathlib import Path

import lightning.pytorch as L
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy, Strategy

from sdtrain.config.build import build
from sdtrain.config.schema import TrainerSettings, at_least
from sdtrain.errors import UserError
from sdtrain.training.checkpoint_io import FolderIO
from sdtrain.training.stopping import disable_lightning_signals

STEP_TIMEOUT = 600
"""Seconds, where a strategy of the user's own does not say strategy.timeout."""

COLLECTIVES_WAIT = 60
"""Seconds by which collectives give up later than the thread that watches the ranks, which can say
more.
"""


def single() -> str:
    """One process on one device."""
    return "auto"


def ddp(*, timeout: int, find_unused_parameters: bool = False) -> DDPStrategy:
    """One process per device with the same weights; gradients are averaged.

    timeout: seconds that a step may take, see sdtrain.training.ranks. find_unused_parameters:
    whether each step looks for trained parameters that had no part in its loss.
    """
    at_least(timeout, 1, "strategy.timeout")
    return DDPStrategy(
        timeout=collectives_limit(timeout),
        gradient_as_bucket_view=True,
        find_unused_parameters=find_unused_parameters,
    )


def collectives_limit(timeout: int) -> timedelta:
    return timedelta(seconds=timeout + COLLECTIVES_WAIT)


def build_strategy(node: dict) -> str | Strategy:
    """sdtrain's own strategies, or any of Lightning's: `timeout` is in seconds for all of them, and
    reaches those that take one.
    """
    if node["_target_"].startswith("sdtrain."):
        return build(node, "strategy")
    timeout = step_timeout(node)
    at_least(timeout, 1, "strategy.timeout")
    strategy = build(node, "strategy", timeout=collectives_limit(timeout))
    if isinstance(strategy, Strategy):
        return strategy
    raise UserError(
        "is no strategy of Lightning's",
        key="strategy._target_",
        value=node["_target_"],
        remedy="Give a subclass of lightning.pytorch.strategies.Strategy.",
    )


def step_timeout(node: dict) -> int:
    """Seconds that a step of several ranks may take, also under a strategy that names none."""
    return node.get("timeout", STEP_TIMEOUT)


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
    strategy: str | Strategy,
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
