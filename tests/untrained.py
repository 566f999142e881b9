"""Untrained models in pixel space, and how pictures are drawn with them."""

from functools import partial

import torch

from sdtrain.conditioning.class_label import ClassLabel
from sdtrain.conditioning.interface import Conditioner, Conditioning
from sdtrain.conditioning.none import Nothing
from sdtrain.conditioning.text import Text
from sdtrain.diffusion import Objective, classifier_free
from sdtrain.diffusion.prediction import Epsilon
from sdtrain.diffusion.times import Uniform
from sdtrain.diffusion.weighting.simple import Simple
from sdtrain.generation.drawing import Drawing
from sdtrain.latent_diffusion import LatentDiffusion
from sdtrain.models.autoencoder import Pixels
from sdtrain.models.unet import UNet
from sdtrain.samplers.ddpm import ddpm
from sdtrain.samplers.grids import trailing
from sdtrain.schedules.linear import linear


class DepthMap(Conditioner):
    """Mean depth as one token."""

    reads = frozenset({"depth"})
    context_dim = 8

    def forward(self, inputs):
        depth = inputs.depth.mean((1, 2, 3)) * ~inputs.dropped
        return Conditioning(context=depth[:, None, None].expand(-1, 1, self.context_dim))


CONDITIONERS = {
    "none": partial(Nothing, context_dim=8),
    "class_label": partial(ClassLabel, num_classes=5, context_dim=8),
    "depth": DepthMap,
    "text": partial(
        Text, context_dim=8, layers=1, heads=2, max_length=12, tokenizer="data/tokenizer"
    ),
}
SIZE = 8
"""Side of their pictures."""


def make(conditioner, channels=None):
    """A few thousand random weights. The betas are small, so that pictures of an untrained network
    are not all black and white."""
    torch.manual_seed(0)
    unet = UNet(
        latent_channels=3,
        context_dim=8,
        block_channels=[8],
        layers_per_block=1,
        attention=[True],
        head_dim=4,
        norm_groups=4,
        pooled_context=True,
        condition_channels=sum(each.channels for each in (channels or {}).values()),
    )
    objective = Objective(
        schedule=linear(beta_end=0.002), prediction=Epsilon(), weighting=Simple(), times=Uniform()
    )
    return LatentDiffusion(
        unet=unet,
        conditioner=CONDITIONERS[conditioner](),
        autoencoder=Pixels(),
        objective=objective,
        caption_dropout=0.1,
        channels=channels,
    )


def drawing(sampler=ddpm, scale=2.0, batch_size=64, grid=trailing):
    return Drawing(
        sampler=sampler,
        grid=grid,
        guidance=classifier_free,
        steps=4,
        guidance_scale=scale,
        batch_size=batch_size,
    )
