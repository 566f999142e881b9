"""The noise of the forward process. Each law makes it of keyed standard normals, sample by sample, in the loader's workers.

A law is a function of draw(shape, index) -> standard normal array, the same at every call with the same index, and of the shape (C, h, w)
of the latents. It returns what the network is to predict, and what is added to the latents where that is something else.
"""

from collections.abc import Callable

import numpy as np

Draw = Callable[[tuple[int, ...], int], np.ndarray]
Drawn = tuple[np.ndarray, np.ndarray | None]


class Gaussian:
    """Standard normal noise."""

    def __call__(self, draw: Draw, shape: tuple[int, int, int]) -> Drawn:
        return draw(shape, 0), None
