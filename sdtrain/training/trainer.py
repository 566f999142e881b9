"""Creates Lightning's Trainer with sdtrain's settings, and the strategies."""

import math
from datetime import timedelta
from pathlib import Path

import lightning.pytorch as L
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy, Strategy

from sdtrain.assemble.load import pick_device
from sdtrain.config.build import build
from sdtrain.config.schema import TrainerSettings, check_at_least
from sdtrain.errors import UserError
from sdtrain.training.checkpoint_io import FolderIO
from sdtrain.training.precision import CPUMixedPrecision, check_precision
from sdtrain.training.stopping import disable_lightning_signals

STEP_TIMEOUT = 600
"""Default of strategy.timeout in seconds, for a strategy of the user's own."""

COLLECTIVES_WAIT = 60
"""Seconds that collectives wait longer than the thread that watches the ranks, whose error message
says more."""


def single() -> str:
    """One process on one device."""
    return "auto"


def ddp(*, timeout: int, find_unused_parameters: bool = False) -> DDPStrategy:
    """One process per device with the same weights; gradients are averaged.

    timeout: seconds that a step may take, see sdtrain.training.ranks. find_unused_parameters:
    whether each step searches for trained parameters that did not contribute to its loss.
    """
    check_at_least(timeout, 1, "strategy.timeout")
    return DDPStrategy(
        timeout=collectives_limit(timeout),
        gradient_as_bucket_view=True,
        find_unused_parameters=find_unused_parameters,
    )


def collectives_limit(timeout: int) -> timedelta:
    """Return the time limit of collectives for a step timeout in seconds."""
    return timedelta(seconds=timeout + COLLECTIVES_WAIT)


def build_strategy(node: dict) -> str | Strategy:
    """Build one of sdtrain's strategies or any of Lightning's.

    `timeout` in the node is in seconds for all of them, and is passed to those that take one.
    Raises UserError if the result is not a strategy.
    """
    if node["_target_"].startswith("sdtrain."):
        return build(node, "strategy")
    timeout = step_timeout(node)
    check_at_least(timeout, 1, "strategy.timeout")
    strategy = build(node, "strategy", timeout=collectives_limit(timeout))
    if isinstance(strategy, Strategy):
        return strategy
    raise UserError(
        "is not a strategy of Lightning",
        key="strategy._target_",
        value=node["_target_"],
        remedy="Set it to a subclass of lightning.pytorch.strategies.Strategy.",
    )


def step_timeout(node: dict) -> int:
    """Return the seconds that a step of several ranks may take, by default STEP_TIMEOUT."""
    return node.get("timeout", STEP_TIMEOUT)


def check_devices(settings: TrainerSettings) -> None:
    """Raise UserError if this machine has too few GPUs, or not the precision.

    Not part of the plan: a sweep may be planned on a machine without them.
    """
    num_gpus = torch.cuda.device_count()
    if settings.accelerator == "gpu" and num_gpus < settings.devices:
        raise UserError(
            f"trainer.accelerator=gpu with trainer.devices={settings.devices}, "
            f"but this machine has {num_gpus} GPUs",
            key="trainer.devices",
            remedy="Set trainer.accelerator=auto or another trainer.devices.",
        )
    check_precision(settings.precision, pick_device(settings.accelerator))


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
    """Create the Trainer. Validation, checkpoints, progress bar and signal handling are sdtrain's
    own; Lightning's are disabled.

    settings: with a precision other than "auto".
    """
    plugins = [checkpoint_io]
    precision = settings.precision
    if precision == "bf16-mixed" and pick_device(settings.accelerator) == "cpu":
        plugins.append(CPUMixedPrecision())
        precision = None
    trainer = L.Trainer(
        accelerator=settings.accelerator,
        devices=settings.devices,
        precision=precision,
        deterministic=settings.deterministic,
        strategy=strategy,
        max_steps=math.ceil(settings.max_images / batch_size),
        max_epochs=-1,
        accumulate_grad_batches=settings.accumulate,
        logger=[logger] if logger else [],
        callbacks=callbacks,
        plugins=plugins,
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
