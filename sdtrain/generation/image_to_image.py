"""Start from a given picture in place of noise, and keep a part of it: image-to-image and
inpainting.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from sdtrain.diffusion import Denoise
from sdtrain.schedules import Schedule


def remaining_times(grid: Tensor, strength: float) -> Tensor:
    """Return the last int(n strength) of the n times of a grid, at which image-to-image starts.

    A picture that is noised to an intermediate time and denoised from there keeps what that noise
    does not hide (Meng et al. 2022, "SDEdit", section 3). The number is that of diffusers.

    strength: in [0, 1]; 0 leaves no times, 1 all.
    """
    count = int(len(grid) * strength)
    return grid[len(grid) - count :]


def noised(x0: Tensor, noise: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """Return alpha x0 + sigma noise at one time t. x0, noise: [B, C, h, w]."""
    alpha, sigma = schedule.alpha_sigma(t)
    return alpha.to(x0.device) * x0 + sigma.to(x0.device) * noise


def latent_mask(mask: Tensor, latent_size: tuple[int, int]) -> Tensor:
    """Return which latents cover a masked pixel, bool [B, 1, h, w].

    mask: bool [B, 1, H, W]. latent_size: (h, w).
    """
    return F.adaptive_max_pool2d(mask.float(), latent_size) > 0


def keep_known(denoise: Denoise, x0: Tensor, mask: Tensor) -> Denoise:
    """Return a denoiser whose result is x0 wherever the mask is false.

    Every step of a sampler leads to alpha x0 + sigma eps, so that x is there, at each level, the
    given picture with noise of that level, and at the end the picture itself.

    x0: latents of the given picture [B, C, h, w]. mask: bool [B, 1, h, w], true where new content
    is drawn.
    """

    def call(x: Tensor, t: Tensor) -> Tensor:
        return torch.where(mask, denoise(x, t), x0.to(x.dtype))

    return call
