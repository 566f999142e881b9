"""Condition on a depth map as one more input channel, in the layout of Stable Diffusion 2 depth."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sdtrain.conditioning.channel_condition import ChannelCondition
from sdtrain.conditioning.interface import Inputs

CONSTANT = -1.0
"""The value of a map without any depth in it, for which the range below is empty."""


class Depth(ChannelCondition):
    """Gives one channel: the depth map at the latents' size, scaled to [-1, 1].

    The map is resized with bicubic interpolation, and the range of each is scaled to [-1, 1], as in
    diffusers' StableDiffusionDepth2ImgPipeline. A constant map becomes -1 everywhere. A dropped one
    is 0 everywhere, which no map is.
    """

    reads = frozenset({"depth"})
    channels = 1

    def maps(self, inputs: Inputs) -> Tensor:
        resized = F.interpolate(
            inputs.depth, inputs.latent_size, mode="bicubic", align_corners=False
        )
        low = resized.amin((1, 2, 3), keepdim=True)
        span = _range(resized)
        # Interpolation may round the values of a constant map apart.
        is_constant = (_range(inputs.depth) == 0) | (span == 0)
        scaled = 2 * (resized - low) / torch.where(is_constant, 1.0, span) - 1
        return torch.where(is_constant, CONSTANT, scaled)


def _range(maps: Tensor) -> Tensor:
    """Return the range of the values of each map, [B, 1, 1, 1]."""
    return maps.amax((1, 2, 3), keepdim=True) - maps.amin((1, 2, 3), keepdim=True)
