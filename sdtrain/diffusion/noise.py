"""The noise of the forward process.

Each law makes it of keyed standard normals, sample by sample, in the loader's workers. A law is a
function of draw(shape, index) -> standard normal array, the same at every call with the same index,
and of the shape (C, h, w) of the latents. It returns what the network is to predict, and what is
added to the latents where that is something else.
"""

from collections.abc import Callable

import numpy as np

from sdtrain.errors import UserError

Draw = Callable[[tuple[int, ...], int], np.ndarray]
Drawn = tuple[np.ndarray, np.ndarray | None]


class Gaussian:
    """Standard normal noise."""

    def __call__(self, draw: Draw, shape: tuple[int, int, int]) -> Drawn:
        return draw(shape, 0), None


class Offset:
    """Noise plus strength times one normal per channel, so that a picture's mean is noised too.

    Its variance is 1 + strength^2 (Guttenberg 2023, "Diffusion with offset noise").
    """

    def __init__(self, *, strength: float = 0.1) -> None:
        if not strength > 0:
            raise UserError(
                "must be above 0; noise=gaussian has no offset",
                key="noise.strength",
                value=strength,
            )
        self.strength = strength

    def __call__(self, draw: Draw, shape: tuple[int, int, int]) -> Drawn:
        return draw(shape, 0) + np.float32(self.strength) * draw((shape[0], 1, 1), 1), None


class InputPerturbation:
    """The latents get eps + gamma xi, the network is to predict eps.

    So training sees what sampling's own errors do (Ning et al. 2023, algorithm 1).
    """

    def __init__(self, *, gamma: float = 0.1) -> None:
        if not gamma > 0:
            raise UserError(
                "must be above 0; noise=gaussian has no perturbation",
                key="noise.gamma",
                value=gamma,
            )
        self.gamma = gamma

    def __call__(self, draw: Draw, shape: tuple[int, int, int]) -> Drawn:
        noise = draw(shape, 0)
        return noise, noise + np.float32(self.gamma) * draw(shape, 1)


class MultiResolution:
    """Noise plus discount^k times noise of 2^k as large squares, k = 1, 2, ..., of unit variance.

    Whitaker 2023, "Multi-resolution noise for diffusion model training". Squares, so that the
    variance is 1 at every pixel; the variance is known, not measured.
    """

    def __init__(self, *, discount: float = 0.4) -> None:
        if not 0 < discount < 1:
            raise UserError("must lie between 0 and 1", key="noise.discount", value=discount)
        self.discount = discount

    def __call__(self, draw: Draw, shape: tuple[int, int, int]) -> Drawn:
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
