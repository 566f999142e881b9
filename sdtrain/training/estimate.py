"""Estimates the training time of a first stage and of the run after it, from a few training steps
of temporary networks.
"""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic

import torch
from torch import nn

from sdtrain.assemble.load import pick_device
from sdtrain.assemble.model import build_model
from sdtrain.config.build import build
from sdtrain.config.cache_keys import OFF
from sdtrain.console import format_duration
from sdtrain.models.autoencoder import write_autoencoder
from sdtrain.models.modes import begin_training
from sdtrain.training.autoencoder_module import AutoencoderModule
from sdtrain.training.diffusion_module import DiffusionModule
from sdtrain.training.optimisation import OptimisedModule
from sdtrain.training.parts import plain_collate
from sdtrain.training.plan import Plan
from sdtrain.training.precision import compute_precision
from sdtrain.training.progress import Progress
from sdtrain.types import PictureData, Row

FEW = 2
"""Number of pictures in the first step that is timed."""

MAX_STEP_SECONDS = 1.0
"""A whole micro-batch is timed only if its step is expected to take less than this; otherwise the
time is extrapolated from FEW pictures."""


@dataclass(frozen=True)
class Estimate:
    """Seconds of training in both stages, without sampling and validation, nor filling a cache."""

    first_stage: float
    run: float

    def line(self, first_images: int, run_images: int) -> str:
        return (
            f"First stage: {first_images:,} images, {format_duration(self.first_stage)}; "
            f"then the run: {run_images:,} images, {format_duration(self.run)}"
        )


def estimate(stage: Plan, plan: Plan, data: PictureData) -> Estimate:
    """Estimate a first stage and the run that it belongs to, on this machine under its present
    load.

    It does not affect the run: a run seeds the weights of its parts itself, and its draws are
    keyed.
    """
    first = untrained_autoencoder(stage)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "autoencoder"
        write_autoencoder(first.net, 1.0, path)
        config = plan.config
        config["model"]["autoencoder"]["path"] = str(path)
        model = build_model(config, Path(folder), data)
    module = DiffusionModule(
        model=model, optimisation=plan.optimisation(), progress=_progress(plan)
    )
    latent_shape = model.autoencoder.latent_shape(data.image_size)
    rows = _few_rows(data)
    if plan.config["data"]["cache"] != OFF:
        rows = [_as_cached(row, model.autoencoder) for row in rows]
    run_rate = _seconds_per_image(module, plan, latent_shape, rows)
    return Estimate(
        first_stage=first_stage_seconds(stage, first, data),
        run=run_rate * plan.prechecked.trainer.max_images,
    )


def untrained_autoencoder(stage: Plan) -> AutoencoderModule:
    """Return the module of a first stage, with random weights."""
    return build(
        stage.config["model"], "model", optimisation=stage.optimisation(), progress=_progress(stage)
    )


def first_stage_seconds(stage: Plan, first: AutoencoderModule, data: PictureData) -> float:
    """Return the seconds that the training of a first stage is estimated to take."""
    shape = first.latent_shape(data.image_size)
    rate = _seconds_per_image(first, stage, shape, _few_rows(data))
    return rate * stage.prechecked.trainer.max_images


def _few_rows(data: PictureData) -> list[Row]:
    pictures = data.split("validation")  # squares, also with data.buckets=true
    return [pictures[(i % len(pictures), i)] for i in range(FEW)]


def _as_cached(row: Row, autoencoder: nn.Module) -> Row:
    """Return a row with moments in place of its picture."""
    with torch.no_grad():
        moments = autoencoder.moments(row.image[None])[0]
    return replace(row, image=None, moments=moments)


def _progress(plan: Plan) -> Progress:
    return Progress(plan.config["data"]["batch_size"], plan.prechecked.trainer.max_images)


def _seconds_per_image(
    module: OptimisedModule, plan: Plan, latent_shape: tuple[int, int, int], rows: list[Row]
) -> float:
    """Return the seconds of a training step on a micro-batch, divided by the images of all ranks.

    The first step is not counted, because it allocates memory. rows: FEW, which are repeated.
    """
    settings = plan.prechecked.trainer
    batch_size = plan.config["data"]["batch_size"]
    micro_batch = max(1, batch_size // (settings.accumulate * settings.devices))
    device = torch.device(pick_device(settings.accelerator))
    module.to(device)
    begin_training(module)
    optimizer = module.configure_optimizers()
    model = module.model if isinstance(module, DiffusionModule) else None
    collate = plain_collate(plan.config, latent_shape, model)
    few = min(FEW, micro_batch)

    def time_step(count: int) -> float:
        """Train one step on `count` pictures and return its seconds."""
        repeated = [rows[i % few] for i in range(count)]
        batch = collate(repeated, list(range(count)), count).to(device)
        began = monotonic()
        with compute_precision(settings.precision, device.type):
            loss = module.training_step(batch, 0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return monotonic() - began

    time_step(few)
    count = few
    if time_step(few) * micro_batch / few < MAX_STEP_SECONDS:
        count = micro_batch
    return min(time_step(count), time_step(count)) / count / settings.devices
