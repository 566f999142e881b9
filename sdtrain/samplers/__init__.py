"""Samplers walk from noise to data, one function per file; grids say which times they visit.

Needs torch alone.
"""

from sdtrain.samplers.walk import Noise, Sampler, Show

__all__ = ["Noise", "Sampler", "Show"]
