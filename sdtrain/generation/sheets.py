"""Sheets that show forward diffusion, the steps of a sampler, and conditions beside pictures."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor, nn

from sdtrain import pictures
from sdtrain.diffusion import add_noise
from sdtrain.generation.drawing import Request
from sdtrain.latent_diffusion import LatentDiffusion
from sdtrain.models.modes import eval_mode
from sdtrain.randomness import KeyedRandom


@torch.no_grad()
def forward_row(model: LatentDiffusion, x0: Tensor, columns: int, seed: int) -> Image.Image:
    """Return one picture at `columns` rising times t as the network sees it: x_t decoded, and x_t.

    x0: [1, C, h, w], its latents. seed: of the noise.
    """
    t = torch.linspace(0, 1, columns, dtype=torch.float64, device=x0.device)
    normal = KeyedRandom(seed, "forward").normal(0, tuple(x0.shape[1:]))
    noise = torch.from_numpy(normal).to(x0.device)
    x = add_noise(x0, noise[None], *model.objective.schedule.alpha_sigma(t))
    heads = [f"t = {time:.2f}" for time in t.tolist()]
    with eval_mode(model.autoencoder):
        decoded = ("x_t, decoded", model.autoencoder.decode(x))
    return pictures.strip([decoded, ("x_t, latents", pictures.latents_as_rgb(x))], heads)


def denoising_strip(
    autoencoder: nn.Module, steps: list[tuple[int, Tensor, Tensor]], columns: int
) -> Image.Image:
    """Return a strip of x_t and the predicted x0, decoded, at evenly spaced steps.

    steps: (number, x_t [1, C, h, w], x0 [1, C, h, w]) of each sampler step.
    """
    last = len(steps) - 1
    indices = {round(i * last / (columns - 1)) for i in range(columns)}
    x = []
    x0 = []
    heads = []
    for index in sorted(indices):
        number, x_t, predicted_x0 = steps[index]
        x.append(x_t)
        x0.append(predicted_x0)
        heads.append(f"step {number + 1}")
    rows = [
        ("x_t, decoded", autoencoder.decode(torch.cat(x))),
        ("predicted x0", autoencoder.decode(torch.cat(x0))),
    ]
    return pictures.strip(rows, heads)


def shown_conditions(request: Request) -> list[tuple[Tensor, str]]:
    """Return the pictures that a picture is drawn from, each as ([3, H, W] in [-1, 1], name)."""
    shown = []
    if request.start is not None:
        image = request.start.image
        if request.start.mask is not None:
            image = torch.where(request.start.mask, 0.0, image)  # what is drawn anew is grey
        shown.append((image, request.start.file.name))
    if request.depth is not None:
        name = "depth" if request.depth_file is None else request.depth_file.name
        shown.append(((2 * request.depth - 1).expand(3, -1, -1), name))
    return shown


def with_conditions(
    requests: Sequence[Request], images: Tensor, titles: Sequence[str], shared_by: int = 1
) -> tuple[Tensor, list[str]]:
    """Return the images and their titles, with the pictures that they are drawn from before them.

    shared_by: number of successive images that are drawn from the same ones, which are then shown
    once.
    """
    shown = []
    shown_titles = []
    for number, request in enumerate(requests):
        if number % shared_by == 0:
            for picture, name in shown_conditions(request):
                shown.append(picture)
                shown_titles.append(name)
        shown.append(images[number])
        shown_titles.append(titles[number])
    return torch.stack(shown), shown_titles
