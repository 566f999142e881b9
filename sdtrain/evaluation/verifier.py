"""Recognise what a picture of flat shapes shows, without knowing the prompt.

The shapes and colours are arguments, so the verifier works for any such data set. With
`sdtrain.data.shapes`:

    Verifier(shapes=SHAPES, palette=COLOURS, radii=RADII, coverage=coverage)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

NOTHING = "none"

_MIN_CONTRAST = 0.2
"""Euclidean distance in [-1, 1]^3 from which a foreground is distinguished from its background."""

_MIN_EXPLAINED = 0.6
"""Share of the foreground's energy that the best shape must explain; pure noise gives under 0.2."""

_NEIGHBOURS = np.stack(np.meshgrid(*[[-1.0, 0.0, 1.0]] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
"""[27, 3]: offsets -1, 0 and 1 in each of x, y and radius."""


class HasAttributes(Protocol):
    """What a picture shows or should show, as words."""

    shape: str
    colour: str
    size: str
    background: str


@dataclass
class Reading:
    """What the verifier recognises: words of its shapes, palette and radii, or NOTHING."""

    shape: str
    colour: str
    size: str
    background: str


class Verifier:
    """Reads shape, colour, size and background from pictures, by fitting rendered shapes.

    Args:
        shapes: names.
        palette: colour name -> RGB in [0, 255].
        radii: size name -> (lowest, highest) radius over the picture's side.
        coverage: the renderer: (shape, x, y, radius, image_size) -> coverage [n, H, W] in [0, 1],
            from arrays [n] in pixels.
    """

    def __init__(
        self,
        *,
        shapes: Sequence[str],
        palette: dict[str, tuple[int, int, int]],
        radii: dict[str, tuple[float, float]],
        coverage: Callable[[str, np.ndarray, np.ndarray, np.ndarray, int], np.ndarray],
    ) -> None:
        self.shapes = tuple(shapes)
        self.radii = dict(radii)
        self.coverage = coverage
        self._names = tuple(palette)
        colours = np.array([palette[name] for name in self._names], dtype=np.float32)
        self._rgb = colours / 127.5 - 1.0
        # Wider than the ranges, because a model may draw too small or too large. In steps of 10 %.
        lowest = 0.7 * min(map(min, radii.values()))
        highest = 1.3 * max(map(max, radii.values()))
        self._grid = lowest * 1.1 ** np.arange(1 + np.ceil(np.log(highest / lowest) / np.log(1.1)))
        self._banks: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    @torch.no_grad()
    def __call__(self, images: Tensor) -> list[Reading]:
        """Return the readings of B images [B, 3, H, H] in [-1, 1].

        Attributes that cannot be recognised are NOTHING: in a picture without a shape all but the
        background, in one with values that are not finite all. Raises ValueError for a tensor of
        another shape.
        """
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
            raise ValueError(
                f"the verifier reads square pictures [B, 3, H, H], not {tuple(images.shape)}"
            )
        return [self._read(image) for image in images.float().clamp(-1, 1).cpu().numpy()]

    def covered(self, image: Tensor) -> np.ndarray:
        """Return how much of each pixel of an image [3, H, W] the shape covers, [H, W].

        About 1 inside the shape and 0 outside; 0 everywhere if there is no shape.
        """
        pixels = image.float().clamp(-1, 1).cpu().numpy()
        if not np.isfinite(pixels).all():
            return np.zeros(pixels.shape[1:], dtype=np.float32)
        ground = _ground(pixels)
        return _covered(pixels - ground[:, None, None])

    def _read(self, image: np.ndarray) -> Reading:
        if not np.isfinite(image).all():
            return Reading(NOTHING, NOTHING, NOTHING, NOTHING)
        ground = _ground(image)
        only_background = Reading(NOTHING, NOTHING, NOTHING, self._nearest_colour(ground))
        difference = image - ground[:, None, None]
        covered = _covered(difference)
        if not covered.any():
            return only_background
        shape, radius, explained, template = self._fit(covered)
        if explained < _MIN_EXPLAINED * float((difference**2).sum()) / _contrast(difference):
            return only_background
        # The same equation solved for the colour, given the fitted coverage.
        colour = ground + (difference * template).sum((1, 2)) / (template**2).sum()
        size = self._nearest_size(radius / image.shape[-1])
        return Reading(shape, self._nearest_colour(colour), size, only_background.background)

    def _nearest_colour(self, rgb: np.ndarray) -> str:
        return self._names[int(((self._rgb - rgb) ** 2).sum(1).argmin())]

    def _nearest_size(self, radius: float) -> str:
        """Return the size whose range has the geometric mean nearest in ratio."""
        distances = {}
        for name, (low, high) in self.radii.items():
            distances[name] = abs(np.log(radius / np.sqrt(low * high)))
        return min(distances, key=distances.get)

    def _fit(self, covered: np.ndarray) -> tuple[str, float, float, np.ndarray]:
        """Fit (shape, radius, explained energy, coverage [H, W]) to a measured coverage [H, W].

        min over gain a of |c - a T|^2 = |c|^2 - <c, T>^2 / |T|^2, so the best template T has the
        largest last term. The gain compensates for blur, which thins out narrow shapes.
        """
        side = covered.shape[0]
        spectra, energies = self._bank(side)
        # <c, T shifted by s> for all s at once: a cyclic cross-correlation.
        matches = np.fft.irfft2(np.fft.rfft2(covered) * spectra.conj(), s=(side, side))
        scores = np.maximum(matches, 0.0) ** 2 / energies[..., None, None]
        scores_of_shape = scores.reshape(len(self.shapes), -1)
        best = None
        for shape, row in zip(self.shapes, scores_of_shape, strict=True):
            # Refinement gains a few percent, so shapes that are far behind cannot win any more.
            if row.max() < 0.8 * scores_of_shape.max():
                continue
            k, down, right = np.unravel_index(row.argmax(), scores.shape[1:])
            start = ((right + side / 2) % side, (down + side / 2) % side, self._grid[k] * side)
            fitted = self._refine(covered, shape, start)
            if best is None or fitted[1] > best[2]:
                best = (shape, *fitted)
        return best

    def _refine(
        self, covered: np.ndarray, shape: str, start: tuple[float, float, float]
    ) -> tuple[float, float, np.ndarray]:
        """Return (radius, explained energy, coverage) of the best (x, y, radius) near `start`.

        Precise to about 0.06 pixels and 0.6 % of the radius.
        """
        centre = np.array(start)
        step = np.array([0.5, 0.5, 0.05 * centre[2]])
        for _ in range(4):
            candidates = centre + _NEIGHBOURS * step
            templates = self.coverage(shape, *candidates.T, covered.shape[0])
            match = np.maximum(np.einsum("nhw,hw->n", templates, covered), 0.0)
            explained = match**2 / np.maximum((templates**2).sum((1, 2)), 1e-6)
            k = int(explained.argmax())
            centre = candidates[k]
            step = step / 2
        return float(centre[2]), float(explained[k]), templates[k]

    def _bank(self, side: int) -> tuple[np.ndarray, np.ndarray]:
        """Return spectra [shape, radius, H, H / 2 + 1] and energies [shape, radius] of all shapes,
        each in the middle of a picture."""
        if side not in self._banks:
            middle = np.full(len(self._grid), side / 2)
            radii = self._grid * side
            bank = np.stack([self.coverage(s, middle, middle, radii, side) for s in self.shapes])
            self._banks[side] = np.fft.rfft2(bank), (bank**2).sum((2, 3))
        return self._banks[side]


def _ground(image: np.ndarray) -> np.ndarray:
    """Return the colour [3] of the background of an image [3, H, W]: the median of its edges."""
    edges = [image[:, 0], image[:, -1], image[:, 1:-1, 0], image[:, 1:-1, -1]]
    return np.median(np.concatenate(edges, axis=1), axis=1)


def _axis(difference: np.ndarray) -> np.ndarray:
    """Return the colour [3] of the shape less that of the background.

    It is the median of the 2 % of pixels that differ most. difference: [3, H, W], the image less
    the background.
    """
    distance = (difference**2).sum(0).ravel()
    count = max(distance.size // 50, 1)
    farthest = np.argpartition(distance, -count)[-count:]
    return np.median(difference.reshape(3, -1)[:, farthest], axis=1)


def _contrast(difference: np.ndarray) -> float:
    """Return the squared distance of the shape's colour from the background's."""
    return float((_axis(difference) ** 2).sum())


def _covered(difference: np.ndarray) -> np.ndarray:
    """Return the coverage c [H, W] of each pixel, for which difference = c axis.

    c is found by least squares over the channels. It is 0 everywhere if the contrast is too low for
    a shape.
    """
    axis = _axis(difference)
    contrast = float((axis**2).sum())
    if contrast < _MIN_CONTRAST**2:
        return np.zeros(difference.shape[1:], dtype=np.float32)
    return np.einsum("chw,c->hw", difference, axis) / contrast
