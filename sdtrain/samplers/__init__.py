"""Samplers walk from noise to data; grids say which times they visit. Needs torch alone."""

from sdtrain.samplers.ddim import ddim
from sdtrain.samplers.ddpm import ddpm
from sdtrain.samplers.grids import leading, trailing
from sdtrain.samplers.walk import Noise, Sampler, Show

__all__ = ["Noise", "Sampler", "Show", "ddim", "ddpm", "leading", "trailing"]
