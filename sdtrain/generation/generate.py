"""Generate pictures from seeds and prompts."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from sdtrain.conditioning.interface import Inputs, MaskedPictures
from sdtrain.diffusion import Denoise
from sdtrain.diffusion.guidance import CONDITIONED, NOTHING, UNCONDITIONED
from sdtrain.errors import UserError
from sdtrain.generation.drawing import Drawing, Request, StartPicture
from sdtrain.generation.image_to_image import (
    keep_known,
    latent_mask,
    noised,
    remaining_times,
)
from sdtrain.latent_diffusion import LatentDiffusion
from sdtrain.models.autoencoder import latent_shape_of
from sdtrain.models.modes import eval_mode
from sdtrain.randomness import KeyedRandom
from sdtrain.samplers import Show
from sdtrain.types import PictureSize

CODED_AT_ONCE = 8
"""Pictures that the autoencoder encodes or decodes in one batch."""


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
        requests: the N pictures to draw. All have a start picture or none, and likewise a mask.
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
            for part in latents.split(CODED_AT_ONCE):
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

    denoisers = {}
    for name, inputs in build_inputs(model, requests, shape[1:]).items():
        denoiser = model.denoiser(model.condition(inputs))
        denoisers[name] = _call_before(denoiser, on_evaluation)
    denoise = drawing.guidance(denoisers, drawing.guidance_scale, schedule)
    grid = drawing.grid(drawing.steps, schedule)
    x = starting_latents(model, requests, drawing, image_size)
    if requests[0].start is not None:
        denoise, x, grid = _start_from_pictures(model, requests, drawing, denoise, x, grid)
    if not len(grid):
        return x
    return drawing.sampler(denoise, x, grid, schedule, noise, show)


def _start_from_pictures(
    model: LatentDiffusion,
    requests: Sequence[Request],
    drawing: Drawing,
    denoise: Denoise,
    x: Tensor,
    grid: Tensor,
) -> tuple[Denoise, Tensor, Tensor]:
    """Return (denoise, x, grid) for image-to-image and inpainting in place of text-to-image."""
    device = model.device
    schedule = model.objective.schedule
    x0 = _encode_starts(model, [request.start for request in requests])
    grid = remaining_times(grid, drawing.strength)
    if not len(grid):
        return denoise, x0, grid
    eps = _draw_normal(requests, "image", 0, tuple(x0.shape[1:])).to(device)
    from_picture = noised(x0, eps, grid[0], schedule)
    if drawing.strength < 1:
        x = from_picture
    if requests[0].start.mask is not None and "mask" not in model.reads:
        masks = torch.stack([request.start.mask for request in requests]).to(device)
        mask = latent_mask(masks, tuple(x0.shape[2:]))
        x = torch.where(mask, x, from_picture)
        denoise = keep_known(denoise, x0, mask)
    return denoise, x, grid


def _encode_starts(model: LatentDiffusion, starts: Sequence[StartPicture]) -> Tensor:
    """Return the latents [B, C, h, w] of start pictures, each encoded once."""
    distinct = list({id(start): start for start in starts}.values())
    places = {id(start): place for place, start in enumerate(distinct)}
    images = torch.stack([start.image for start in distinct])
    latents = [model.latents(part.to(model.device)) for part in images.split(CODED_AT_ONCE)]
    return torch.cat(latents)[[places[id(start)] for start in starts]]


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
) -> dict[str, Inputs]:
    """Return the inputs of each denoiser that guidance may combine, see sdtrain.diffusion.guidance.

    Without a condition, a negative prompt replaces the empty one, so that guidance leads away from
    it. Labels and channel conditions have no negative. Raises UserError if a depth map is missing.
    """
    device = model.device
    reads = model.reads
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
    masked = _stack_masked(model, requests) if "mask" in reads else None
    all_dropped = torch.ones_like(dropped)
    unconditioned = Inputs(negatives, labels, dropped, latent_size, depth, masked=masked)
    inputs = {
        CONDITIONED: Inputs(prompts, labels, none_dropped, latent_size, depth, masked=masked),
        UNCONDITIONED: unconditioned,
    }
    if model.channels:
        channels_dropped = dict.fromkeys(model.channels, all_dropped)
        inputs[NOTHING] = replace(unconditioned, channels_dropped=channels_dropped)
    return inputs


def _stack_masked(model: LatentDiffusion, requests: Sequence[Request]) -> MaskedPictures:
    """Return the pictures to inpaint. Raises UserError if one or its mask is missing."""
    images = []
    masks = []
    for request in requests:
        if request.start is None or request.start.mask is None:
            raise UserError(
                "This model draws a masked part of a picture, but none is given",
                key="mask",
                remedy="Set init_image=FILE and mask=FILE.",
            )
        images.append(request.start.image)
        masks.append(request.start.mask)
    return model.masked_pictures(
        torch.stack(images).to(model.device), torch.stack(masks).float().to(model.device)
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
