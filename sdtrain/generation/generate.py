"""Generate pictures from seeds and prompts."""

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
from sdtrain.models.autoencoder import latent_shape_of
from sdtrain.models.modes import eval_mode
from sdtrain.randomness import KeyedRandom
from sdtrain.samplers import Show
from sdtrain.types import PictureSize

DECODED_AT_ONCE = 8
"""Latents that the autoencoder decodes in one batch."""


@torch.no_grad()
def generate(
    model: LatentDiffusion,
    requests: list[Request],
    drawing: Drawing,
    image_size: PictureSize,
    show: Show | None = None,
    *,
    on_evaluation: Callable[[], None] | None = None,
) -> Tensor:
    """Return pictures [N, 3, H, W] in [-1, 1] on the CPU, drawn with the model's current weights.

    Every random number of a picture is keyed by the picture's own seed, so a picture does not
    depend on its batch.

    Args:
        model: the model to draw with.
        requests: the N pictures to draw.
        drawing: sampler, grid, steps and guidance.
        image_size: side or (height, width) of the pictures in pixels.
        show: called as show(step, x, x0) with the latents of each step, batch after batch.
        on_evaluation: called before each evaluation of a network; may raise to stop.
    """
    size = drawing.batch_size
    images = []
    with eval_mode(model):
        for start in range(0, len(requests), size):
            batch = requests[start : start + size]
            latents = _draw_latents(model, batch, drawing, image_size, show, on_evaluation)
            for part in latents.split(DECODED_AT_ONCE):
                if on_evaluation:
                    on_evaluation()
                images.append(model.autoencoder.decode(part).float().cpu())
    return torch.cat(images)


def _draw_latents(
    model: LatentDiffusion,
    requests: list[Request],
    drawing: Drawing,
    image_size: PictureSize,
    show: Show | None,
    on_evaluation: Callable[[], None] | None,
) -> Tensor:
    """Return latents [B, C, h, w] of unit variance for one batch of requests."""
    shape = latent_shape_of(model.autoencoder, image_size)
    device = model.device
    schedule = model.objective.schedule

    def noise(step: int) -> Tensor:
        return _draw_normal(requests, "sampler", step, shape).to(device)

    conditioned, unconditioned = build_inputs(model, requests, shape[1:])
    denoisers = {}
    for name, inputs in ((CONDITIONED, conditioned), (UNCONDITIONED, unconditioned)):
        denoiser = model.denoiser(model.conditioner(inputs))
        denoisers[name] = _call_before(denoiser, on_evaluation)
    denoise = drawing.guidance(denoisers, drawing.guidance_scale, schedule)
    grid = drawing.grid(drawing.steps, schedule)
    x = starting_latents(model, requests, drawing, image_size)
    return drawing.sampler(denoise, x, grid, schedule, noise, show)


def starting_latents(
    model: LatentDiffusion, requests: Sequence[Request], drawing: Drawing, image_size: PictureSize
) -> Tensor:
    """Return the noise [B, C, h, w] that the sampler starts from, scaled to its first time.

    It is on the model's device.
    """
    schedule = model.objective.schedule
    shape = latent_shape_of(model.autoencoder, image_size)
    # Standard deviation of noised latents of unit variance at the first time. It differs from 1 on
    # a straight path that does not begin at alpha = 0.
    alpha, sigma = schedule.alpha_sigma(drawing.grid(drawing.steps, schedule)[0])
    device = model.device
    std = (alpha.to(device) ** 2 + sigma.to(device) ** 2).sqrt()
    return _draw_normal(requests, "image", 0, shape).to(device) * std


def _draw_normal(
    requests: Sequence[Request], purpose: str, ordinal: int, shape: tuple[int, int, int]
) -> Tensor:
    """Return standard normal draws [B, C, h, w], each keyed by the seed of its request."""
    draws = []
    for request in requests:
        draws.append(KeyedRandom(request.seed, purpose).normal(ordinal, shape))
    return torch.from_numpy(np.stack(draws))


def _call_before(denoise: Denoise, on_evaluation: Callable[[], None] | None) -> Denoise:
    """Return the denoiser with a call of `on_evaluation` before each evaluation."""
    if on_evaluation is None:
        return denoise

    def call(x: Tensor, t: Tensor) -> Tensor:
        on_evaluation()
        return denoise(x, t)

    return call


def build_inputs(
    model: LatentDiffusion, requests: Sequence[Request], latent_size: tuple[int, int]
) -> tuple[Inputs, Inputs]:
    """Return the inputs with the conditions, and those without.

    A negative prompt replaces the empty prompt of the latter, so that guidance leads away from it.
    Labels have no negative. Raises UserError if a depth map is missing.
    """
    device = model.device
    reads = model.conditioner.reads
    prompts = []
    negatives = []
    class_labels = []
    no_negative = []
    for request in requests:
        prompts.append(request.prompt)
        negatives.append(request.negative_prompt)
        class_labels.append(request.label)
        no_negative.append(not request.negative_prompt or "caption" not in reads)
    labels = torch.tensor(class_labels, device=device)
    dropped = torch.tensor(no_negative, device=device)
    none_dropped = torch.zeros_like(dropped)
    depth = _stack_depth(requests, device) if "depth" in reads else None
    return (
        Inputs(prompts, labels, none_dropped, latent_size, depth),
        Inputs(negatives, labels, dropped, latent_size, depth),
    )


def _stack_depth(requests: Sequence[Request], device: torch.device) -> Tensor:
    """Return the depth maps [B, 1, H, W]. Raises UserError if one is missing."""
    maps = []
    for request in requests:
        if request.depth is None:
            raise UserError(
                "This model reads a depth map for each picture, but none is given",
                key="checkpoint",
                remedy="Give another checkpoint. During training, pictures of this one are drawn "
                "with the depth maps of its data.",
            )
        maps.append(request.depth)
    return torch.stack(maps).to(device)
