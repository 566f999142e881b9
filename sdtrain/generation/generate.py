"""Seed and prompt to picture."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from sdtrain.conditioning.interface import Inputs
from sdtrain.diffusion import Denoise
from sdtrain.diffusion.guidance import CONDITIONED, UNCONDITIONED
from sdtrain.errors import UserError
from sdtrain.generation.drawing import Drawing, Request
from sdtrain.latent_diffusion import LatentDiffusion
from sdtrain.models.modes import eval_mode
from sdtrain.randomness import KeyedRandom
from sdtrain.samplers import Show

DECODED_AT_ONCE = 8


@torch.no_grad()
def generate(
    model: LatentDiffusion,
    requests: list[Request],
    drawing: Drawing,
    image_size: int,
    show: Show | None = None,
    *,
    go_on: Callable[[], None] | None = None,
) -> Tensor:
    """Pictures [N, 3, H, W] in [-1, 1] on the CPU, with the model's present weights.

    Every random number of a picture is keyed by its own seed, so it does not depend on the batch it
    was drawn in. show(step, x, x0) sees the latents of each step, of one batch after the other.
    go_on is called before each network evaluation, and may raise to end the drawing.
    """
    size = drawing.batch_size
    drawn = []
    with eval_mode(model):
        for start in range(0, len(requests), size):
            batch = requests[start : start + size]
            latents = _draw_batch(model, batch, drawing, image_size, show, go_on)
            for part in latents.split(DECODED_AT_ONCE):
                if go_on:
                    go_on()
                drawn.append(model.autoencoder.decode(part).float().cpu())
    return torch.cat(drawn)


def _draw_batch(
    model: LatentDiffusion,
    requests: list[Request],
    drawing: Drawing,
    image_size: int,
    show: Show | None,
    go_on: Callable[[], None] | None,
) -> Tensor:
    """Latents."""
    shape = model.autoencoder.latent_shape(image_size)
    device = model.device
    schedule = model.objective.schedule
    starts = [KeyedRandom(request.seed, "image") for request in requests]
    steps = [KeyedRandom(request.seed, "sampler") for request in requests]
    x = _stacked([random.normal(0, shape) for random in starts], device)

    def noise(step: int) -> Tensor:
        return _stacked([random.normal(step, shape) for random in steps], device)

    conditioned, unconditioned = inputs_of(model, requests, shape[1:])
    denoisers = {}
    for name, inputs in ((CONDITIONED, conditioned), (UNCONDITIONED, unconditioned)):
        denoisers[name] = _preceded(model.denoiser(model.conditioner(inputs)), go_on)
    denoise = drawing.guidance(denoisers, drawing.guidance_scale, schedule)
    grid = drawing.grid(drawing.steps, schedule)
    # What latents of unit variance have at the first time; not 1 on a straight path that begins
    # below alpha = 0.
    alpha, sigma = (c.to(device) for c in schedule.alpha_sigma(grid[0]))
    x = x * (alpha**2 + sigma**2).sqrt()
    return drawing.sampler(denoise, x, grid, schedule, noise, show)


def _preceded(denoise: Denoise, go_on: Callable[[], None] | None) -> Denoise:
    """The denoiser with a call of `go_on` before each evaluation."""
    if go_on is None:
        return denoise

    def call(x: Tensor, t: Tensor) -> Tensor:
        go_on()
        return denoise(x, t)

    return call


def inputs_of(
    model: LatentDiffusion, requests: Sequence[Request], latent_size: tuple[int, int]
) -> tuple[Inputs, Inputs]:
    """The inputs with every condition, and those without: a negative prompt stands where the empty
    one would, and guidance leads away from it. A label has no negative."""
    device = model.device
    reads = model.conditioner.reads
    labels = torch.tensor([request.label for request in requests], device=device)
    depth = _depth_of(requests, device) if "depth" in reads else None
    kept = torch.zeros(len(requests), dtype=torch.bool, device=device)
    prompts = [request.prompt for request in requests]
    negatives = [request.negative_prompt for request in requests]
    has_negative = [bool(negative) and "caption" in reads for negative in negatives]
    dropped = ~torch.tensor(has_negative, device=device)
    return (
        Inputs(prompts, labels, kept, latent_size, depth),
        Inputs(negatives, labels, dropped, latent_size, depth),
    )


def _depth_of(requests: Sequence[Request], device: torch.device) -> Tensor:
    missing = [request for request in requests if request.depth is None]
    if missing:
        raise UserError(
            "This model reads a depth map for each picture, and none is given",
            key="checkpoint",
            remedy="Give another checkpoint; while it trains its pictures are drawn with the depth "
            "maps of its data.",
        )
    return torch.stack([request.depth for request in requests]).to(device)


def _stacked(arrays: list[np.ndarray], device: torch.device) -> Tensor:
    return torch.from_numpy(np.stack(arrays)).to(device)
