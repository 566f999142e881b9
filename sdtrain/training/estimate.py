"""How long a first stage and the run after it will take, from a few steps of networks that are
thrown away.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import torch

from sdtrain.assemble.load import pick_device
from sdtrain.assemble.model import build_model
from sdtrain.config.build import build
from sdtrain.models.autoencoder import write_autoencoder
from sdtrain.models.modes import begin_training
from sdtrain.training.autoencoder_module import AutoencoderModule
from sdtrain.training.diffusion_module import DiffusionModule
from sdtrain.training.optimisation import OptimisedModule
from sdtrain.training.parts import plain_collate
from sdtrain.training.plan import Plan
from sdtrain.training.progress import Progress
from sdtrain.types import PictureData

FEW = 2
"""Pictures of the first step that is tried."""

LONG = 1.0
"""Seconds that a step of a whole micro-batch may take; a longer one is reckoned from few pictures.
"""

AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass(frozen=True)
class Estimate:
    """Seconds of training alone, without what looks at the model: of both stages."""

    first_stage: float
    run: float

    def line(self, first_images: int, run_images: int) -> str:
        return (
            f"First stage: {first_images:,} images, {rounded(self.first_stage)}; then the run: "
            f"{run_images:,} images, {rounded(self.run)}"
        )


def rounded(seconds: float) -> str:
    """ "about 21 min", in the largest unit that it fills."""
    if seconds >= 5400:
        return f"about {seconds / 3600:.1f} hours"
    if seconds >= 90:
        return f"about {seconds / 60:.0f} min"
    return f"about {max(1, round(seconds))} s"


def estimate(stage: Plan, plan: Plan, data: PictureData) -> Estimate:
    """Of a first stage and of the run that it belongs to, on this machine as it is now.

    Nothing of it is kept: the parts of a run seed their own weights, and its draws are keyed.
    """
    size = data.image_size
    first: AutoencoderModule = build(
        stage.config["model"], "model", optimisation=stage.optimisation(), progress=_progress(stage)
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "autoencoder"
        write_autoencoder(first.net, 1.0, path)
        config = plan.config
        config["model"]["autoencoder"]["path"] = str(path)
        model = build_model(config, Path(folder), data)
    module = DiffusionModule(
        model=model, optimisation=plan.optimisation(), progress=_progress(plan)
    )
    of_first = _seconds_per_image(first, stage, first.latent_shape(size), data)
    of_run = _seconds_per_image(module, plan, model.autoencoder.latent_shape(size), data)
    return Estimate(
        of_first * stage.draft.trainer.max_images, of_run * plan.draft.trainer.max_images
    )


def _progress(plan: Plan) -> Progress:
    return Progress(plan.config["data"]["batch_size"], plan.draft.trainer.max_images)


def _seconds_per_image(
    module: OptimisedModule, plan: Plan, latent_shape: tuple[int, int, int], data: PictureData
) -> float:
    """Of a training step on a micro-batch, all ranks together; the first step is not counted: it
    allocates memory.
    """
    settings = plan.draft.trainer
    batch_size = plan.config["data"]["batch_size"]
    whole = max(1, batch_size // (settings.accumulate * settings.devices))
    device = torch.device(pick_device(settings.accelerator))
    module.to(device)
    begin_training(module)
    optimizer = module.configure_optimizers()
    collate = plain_collate(plan.config, latent_shape)
    pictures = data.split("train")
    few = min(FEW, whole)
    rows = [pictures[(i % len(pictures), i)] for i in range(few)]

    def step(count: int) -> float:
        """Its seconds."""
        some = [rows[i % few] for i in range(count)]
        batch = collate(some, list(range(count)), count).to(device)
        began = monotonic()
        dtype = AUTOCAST.get(settings.precision)
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            loss = module.training_step(batch, 0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return monotonic() - began

    step(few)
    count = whole if step(few) * whole / few < LONG else few
    return min(step(count), step(count)) / count / settings.devices
