"""Lightning's Trainer as sdtrain needs it, and the strategies."""

import math
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import lightning.pytorch as L
import torch
from lightning.pytorch.strategies import DDPStrategy

from sdtrain.errors import UserError
from sdtrain.training.callbacks.checkpoint import FolderIO, leave_signals_to_us


@dataclass
class TrainerSettings:
    """The trainer section of a configuration. Budgets and intervals count images."""

    max_images: int
    accelerator: Literal[
        "auto", "cpu", "gpu"
    ]  # no MPS: it lacks the float64 that times are kept in
    devices: int
    precision: Literal["32-true", "bf16-mixed", "16-mixed"]
    accumulate: int
    gradient_clip: float
    max_skipped: int | None
    log_every: int
    threads: int | None
    max_minutes: float | None

    def __post_init__(self) -> None:
        for name in ("max_images", "devices", "accumulate", "log_every"):
            if getattr(self, name) < 1:
                raise UserError(f"trainer.{name}={getattr(self, name)} must be at least 1.")
        if self.max_skipped is not None and self.max_skipped < 0:
            raise UserError(f"trainer.max_skipped={self.max_skipped} must be at least 0, or null.")
        if self.precision == "16-mixed" and self.max_skipped is None:
            # The loss scale of 16-mixed overflows now and then; that is how it is found.
            raise UserError(
                "trainer.precision=16-mixed needs trainer.max_skipped: steps whose scaled gradient overflows are left out. Set it, to 1000 say."
            )
        if self.max_minutes is not None and not self.max_minutes > 0:
            raise UserError(
                f"trainer.max_minutes={self.max_minutes:g} must be above 0, or null for no limit of time."
            )
        if self.threads is not None and self.threads < 1:
            raise UserError(
                f"trainer.threads={self.threads} must be at least 1, or null for the machine's number."
            )
        if not self.gradient_clip > 0:
            raise UserError(
                f"trainer.gradient_clip={self.gradient_clip} must be above 0; .inf does not clip."
            )

    def check_devices(self) -> None:
        """Whether this machine has them. A sweep may be started on another."""
        if self.accelerator == "gpu" and torch.cuda.device_count() < self.devices:
            raise UserError(
                f"trainer.accelerator=gpu with trainer.devices={self.devices}, but this machine has {torch.cuda.device_count()} GPUs. "
                f"Set trainer.accelerator=auto or another trainer.devices."
            )


def single() -> str:
    """One process on one device."""
    return "auto"


def ddp(*, timeout: int) -> DDPStrategy:
    """One process per device with the same weights; gradients are averaged. timeout: seconds that a step may take, see callbacks/ranks.py."""
    if timeout < 1:
        raise UserError(f"strategy.timeout={timeout} must be at least 1 second.")
    # Collectives give up later than the thread that watches, which can say more.
    return DDPStrategy(timeout=timedelta(seconds=timeout + 60), gradient_as_bucket_view=True)


def make_trainer(
    settings: TrainerSettings,
    strategy: str | DDPStrategy,
    batch_size: int,
    loggers: list,
    callbacks: list[L.Callback],
    run_dir: Path,
    io: FolderIO,
) -> L.Trainer:
    trainer = L.Trainer(
        accelerator=settings.accelerator,
        devices=settings.devices,
        precision=settings.precision,
        strategy=strategy,
        max_steps=math.ceil(settings.max_images / batch_size),
        max_epochs=-1,
        accumulate_grad_batches=settings.accumulate,
        logger=loggers,
        callbacks=callbacks,
        plugins=[io],
        default_root_dir=run_dir,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        log_every_n_steps=1,
    )
    leave_signals_to_us(trainer)
    return trainer
