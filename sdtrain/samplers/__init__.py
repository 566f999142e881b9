"""Samplers, one function per file, and the grids of times that they visit. Needs torch only."""

from sdtrain.samplers.sampler import Noise, Sampler, Show

__all__ = ["Noise", "Sampler", "Show"]
