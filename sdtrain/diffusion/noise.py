"""The distributions of the noise in the forward process.

Each is a function (draw, shape) -> (the noise that the network predicts, the noise that is added to
the latents), where None as the second means that both are the same. It makes the noise of one
sample, in the loader's workers. shape: (C, h, w) of the latents. draw(shape, index) returns a
standard normal array of that shape, the same whenever it is called for this sample with this index.
"""

from collections.abc import Callable

import numpy as np

from sdtrain.errors import UserError

Draw = Callable[[tuple[int, ...], int], np.ndarray]
NoisePair = tuple[np.ndarray, np.ndarray | None]
"""(noise to predict, noise to add or None if it is the same)."""


class Gaussian:
    """Standard normal noise."""

    def __call__(self, draw: Draw, shape: tuple[int, int, int]) -> NoisePair:
        return draw(shape, 0), None


class Offset:
    """Noise plus strength times one normal per channel, so that a picture's mean is noised too.

    The variance is 1 + strength^2 (Guttenberg 2023, "Diffusion with offset noise").
    """

    def __init__(self, *, strength: float = 0.1) -> None:
        if not strength > 0:
            raise UserError(
                "must be above 0; noise=gaussian has no offset",
                key="noise.strength",
                value=strength,
            )
        self.strength = strength

    def __call__(self, draw: Draw, shape: tuple[int, int, int]) -> NoisePair:
        return draw(shape, 0) + np.float32(self.strength) * draw((shape[0], 1, 1), 1), None


class InputPerturbation:
    """Add eps + gamma xi to the latents, while the network predicts eps.

    It imitates in training the errors that the network meets in sampling (Ning et al. 2023,
    algorithm 1).
    """

    def __init__(self, *, gamma: float = 0.1) -> None:
        if not gamma > 0:
            raise UserError(
                "must be above 0; noise=gaussian has no perturbation",
                key="noise.gamma",
                value=gamma,
            )
        self.gamma = gamma

    def __call__(self, draw: Draw, shape: tuple[int, int, int]) -> NoisePair:
        noise = draw(shape, 0)
        return noise, noise + np.float32(self.gamma) * draw(shape, 1)


class MultiResolution:
    """Noise plus discount^k times noise in squares of side 2^k, k = 1, 2, ..., of unit variance.

    Whitaker 2023, "Multi-resolution noise for diffusion model training". With constant squares
    instead of interpolation the variance is the same at every pixel; the sum is divided by its
    known standard deviation, not by a measured one.
    """

    def __init__(self, *, discount: float = 0.4) -> None:
        if not 0 < discount < 1:
            raise UserError("must lie between 0 and 1", key="noise.discount", value=discount)
        self.discount = discount

    def __call__(self, draw: Draw, shape: tuple[int, int, int]) -> NoisePair:
        channels, height, width = shape
        total = draw(shape, 0).copy()
        variance = 1.0
        level = 1
        while 2**level <= max(height, width):
            size = 2**level
            coarse = draw((channels, -(-height // size), -(-width // size)), level)
            squares = coarse.repeat(size, 1).repeat(size, 2)[:, :height, :width]
            total += np.float32(self.discount**level) * squares
            variance += self.discount ** (2 * level)
            level += 1
        return total / np.float32(variance**0.5), None
