"""Condition on the part of a picture that is kept, in the layout of Stable Diffusion inpainting."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sdtrain.conditioning.channel_condition import ChannelCondition
from sdtrain.conditioning.interface import Inputs


class Inpainting(ChannelCondition):
    """Gives 1 + C channels: the mask at the latents' size, and the latents of the masked picture.

    The mask is 1 where the picture is drawn anew; there the masked picture is grey. As in
    diffusers' StableDiffusionInpaintPipeline, but from the mean of the autoencoder's posterior. A
    sample without this condition is masked everywhere.

    Args:
        dropout: see ChannelCondition.
        latent_channels: C.
    """

    reads = frozenset({"mask"})

    def __init__(self, *, dropout: float, latent_channels: int) -> None:
        super().__init__(dropout=dropout)
        self.channels = 1 + latent_channels

    def forward(self, inputs: Inputs, dropped: Tensor) -> Tensor:
        masked = inputs.masked
        mask = torch.where(dropped.view(-1, 1, 1, 1), 1.0, masked.mask)
        with torch.no_grad():
            latents = masked.encode(masked.image * (1 - mask))
        small = F.interpolate(mask, inputs.latent_size)
        return torch.cat([small.to(latents.dtype), latents], dim=1)
