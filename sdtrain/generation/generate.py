"""Seed and prompt to picture."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from sdtrain.diffusion import Denoise, Denoiser
from sdtrain.randomness import KeyedRandom
from sdtrain.samplers import Sampler, Show
from sdtrain.samplers.grids import trailing
from sdtrain.schedules import Schedule
from sdtrain.schedules.linear import linear
from sdtrain.training.diffusion_module import DiffusionModule


@dataclass(frozen=True)
class Request:
    """One picture to draw. label is read by class_label conditioners alone, prompt and negative_prompt by text ones."""

    seed: int
    prompt: str = ""
    negative_prompt: str = ""
    label: int = 0


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn.

    sampler: see sdtrain.samplers; grid: (steps, schedule) -> falling times; guidance: (conditional, unconditional, guidance_scale,
    schedule) -> guided denoiser; steps: times visited; guidance_scale: 1 is no guidance; batch_size: pictures drawn at once.
    """

    sampler: Sampler
    grid: Callable[[int, Schedule], Tensor]
    guidance: Callable[[Denoise, Denoise, float, Schedule], Denoise]
    steps: int
    guidance_scale: float
    batch_size: int = 64


@torch.no_grad()
def generate(
    module: DiffusionModule,
    requests: list[Request],
    drawing: Drawing,
    image_size: int,
    show: Show | None = None,
) -> Tensor:
    """Pictures [N, 3, H, W] in [-1, 1] on the CPU, with the module's present weights.

    Every random number of a picture is keyed by its own seed, so it does not depend on the batch it was drawn in. show(step, x, x0) sees
    the latents of each step; it wants all requests to fit into one batch.
    """
    batches = [
        requests[i : i + drawing.batch_size] for i in range(0, len(requests), drawing.batch_size)
    ]
    was_training = module.training
    module.eval()
    try:
        return torch.cat(
            [_generate(module, batch, drawing, image_size, show).float().cpu() for batch in batches]
        )
    finally:
        module.train(was_training)


def _generate(
    module: DiffusionModule,
    requests: list[Request],
    drawing: Drawing,
    image_size: int,
    show: Show | None,
) -> Tensor:
    shape, device = module.autoencoder.latent_shape(image_size), module.device
    keyed = [(KeyedRandom(r.seed, "image"), KeyedRandom(r.seed, "sampler")) for r in requests]
    stack = lambda arrays: torch.from_numpy(np.stack(arrays)).to(device)  # noqa: E731
    x = stack([first.normal(0, shape) for first, _ in keyed])
    noise = lambda step: stack([steps.normal(step, shape) for _, steps in keyed])  # noqa: E731
    schedule, prediction = module.objective.schedule, module.objective.prediction
    denoiser = lambda conditioning: Denoiser(module.network(conditioning), schedule, prediction)  # noqa: E731
    labels, kept = (
        torch.tensor([r.label for r in requests], device=device),
        torch.zeros(len(requests), dtype=torch.bool, device=device),
    )
    conditional = denoiser(module.conditioner([r.prompt for r in requests], labels, kept))
    # A negative prompt stands where the empty one would: guidance leads away from it. A label has no negative.
    dropped = torch.tensor(
        [module.conditioner.reads != "caption" or not r.negative_prompt for r in requests],
        device=device,
    )
    unconditional = denoiser(
        module.conditioner([r.negative_prompt for r in requests], labels, dropped)
    )
    denoise = drawing.guidance(conditional, unconditional, drawing.guidance_scale, schedule)
    grid = drawing.grid(drawing.steps, schedule)
    alpha, sigma = (c.to(device) for c in schedule.alpha_sigma(grid[0]))
    x = (
        x * (alpha**2 + sigma**2).sqrt()
    )  # what latents of unit variance have at the first time; not 1 on a straight path that begins below alpha = 0
    return module.autoencoder.decode(drawing.sampler(denoise, x, grid, schedule, noise, show))


def by_steps(
    module: DiffusionModule,
    requests: list[Request],
    drawing: Drawing,
    image_size: int,
    steps: list[int],
) -> tuple[dict, dict]:
    """({steps: pictures [N, 3, H, W]}, {steps: their distances [N] from those of the most steps}), with the same seeds.

    The distance is the root mean square over pixels, as a share of their range. It means something for samplers that draw no noise, see
    draws_noise: the others walk another path for each number of steps.
    """
    drawn = {
        each: generate(module, requests, replace(drawing, steps=each), image_size)
        for each in sorted(steps)
    }
    *few, most = drawn
    return drawn, {
        each: (drawn[each] - drawn[most]).square().mean((1, 2, 3)).sqrt() / 2 for each in few
    }


def draws_noise(drawing: Drawing) -> bool:
    """Whether the sampler asks for noise along the way."""
    asked, schedule, x = [], linear(), torch.zeros(1, 1, 2, 2)
    drawing.sampler(
        lambda x, t: torch.zeros_like(x),
        x,
        trailing(4, schedule),
        schedule,
        lambda step: asked.append(step) or x,
        None,
    )
    return bool(asked)
