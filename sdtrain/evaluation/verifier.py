"""Reads what a picture of flat shapes shows, without ever seeing the prompt.

Which shapes and colours there are is given to it (`sdtrain.data.shapes` has it all), so it can
follow any such data set:

    Verifier(shapes=SHAPES, palette=COLOURS, radii=RADII, coverage=coverage)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

NOTHING = "none"

_FAINTEST = 0.2
"""Euclidean distance in [-1, 1]^3 under which a foreground is not told from its background."""

_POOREST = 0.6
"""Share of the foreground's energy that the best shape must explain; pure noise gives under 0.2."""

_STEPS = np.stack(np.meshgrid(*[[-1.0, 0.0, 1.0]] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
"""[27, 3]: no step, and one to either side, in each of x, y and radius."""


class Described(Protocol):
    """Anything that says what a picture shows or should show."""

    shape: str
    colour: str
    size: str
    background: str


@dataclass
class Reading:
    """What the verifier sees: words of its palette, shapes and radii, or NOTHING."""

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
        # Wider than the bands: a model may draw too small or too large. In steps of 10 %.
        lowest = 0.7 * min(low for low, _ in radii.values())
        highest = 1.3 * max(high for _, high in radii.values())
        self._grid = lowest * 1.1 ** np.arange(1 + np.ceil(np.log(highest / lowest) / np.log(1.1)))
        self._banks: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    @torch.no_grad()
    def __call__(self, images: Tensor) -> list[Reading]:
        """images [B, 3, H, H] in [-1, 1] -> B readings.

        A picture without a shape, or with a number that is not finite, gets NOTHING for what cannot
        be seen. Raises ValueError for another shape of tensor.
        """
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
            raise ValueError(
                f"the verifier reads square pictures [B, 3, H, H], not {tuple(images.shape)}"
            )
        return [self._read(image) for image in images.float().clamp(-1, 1).cpu().numpy()]

    def _read(self, image: np.ndarray) -> Reading:
        if not np.isfinite(image).all():
            return Reading(NOTHING, NOTHING, NOTHING, NOTHING)
        edges = [image[:, 0], image[:, -1], image[:, 1:-1, 0], image[:, 1:-1, -1]]
        ground = np.median(np.concatenate(edges, axis=1), axis=1)
        nothing = Reading(NOTHING, NOTHING, NOTHING, self._nearest(ground))
        difference = image - ground[:, None, None]
        # The colour of the shape: median of the 2 % of pixels that differ most from the background.
        distance = (difference**2).sum(0).ravel()
        count = max(distance.size // 50, 1)
        farthest = np.argpartition(distance, -count)[-count:]
        axis = np.median(difference.reshape(3, -1)[:, farthest], axis=1)
        contrast = float((axis**2).sum())
        if contrast < _FAINTEST**2:
            return nothing
        # p = ground + c axis: the coverage c of each pixel by least squares over its channels.
        covered = np.einsum("chw,c->hw", difference, axis) / contrast
        shape, radius, explained, template = self._fit(covered)
        if explained < _POOREST * float((difference**2).sum()) / contrast:
            return nothing
        # The same equation the other way round: the colour given the fitted coverage.
        colour = ground + (difference * template).sum((1, 2)) / (template**2).sum()
        size = self._size(radius / image.shape[-1])
        return Reading(shape, self._nearest(colour), size, nothing.background)

    def _nearest(self, rgb: np.ndarray) -> str:
        return self._names[int(((self._rgb - rgb) ** 2).sum(1).argmin())]

    def _size(self, radius: float) -> str:
        """The band whose geometric middle is nearest in ratio."""
        distances = {}
        for name, (low, high) in self.radii.items():
            distances[name] = abs(np.log(radius / np.sqrt(low * high)))
        return min(distances, key=distances.get)

    def _fit(self, covered: np.ndarray) -> tuple[str, float, float, np.ndarray]:
        """Best (shape, radius, explained energy, its coverage [H, W]) for measured coverage [H, W].

        min over gain a of |c - a T|^2 = |c|^2 - <c, T>^2 / |T|^2, so the best template T has the
        largest last term. The gain forgives what blur takes from thin shapes.
        """
        side = covered.shape[0]
        spectra, energies = self._bank(side)
        # <c, T moved by s> for all s at once: a cyclic cross-correlation.
        matches = np.fft.irfft2(np.fft.rfft2(covered) * spectra.conj(), s=(side, side))
        scores = np.maximum(matches, 0.0) ** 2 / energies[..., None, None]
        bests = scores.reshape(len(self.shapes), -1)
        best = None
        for shape, row in zip(self.shapes, bests, strict=True):
            # Refining gains a few percent: shapes far behind cannot win any more.
            if row.max() < 0.8 * bests.max():
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
        """(radius, explained energy, coverage) of the best (x, y, radius) near start, to about 0.06
        pixels and 0.6 %."""
        centre = np.array(start)
        step = np.array([0.5, 0.5, 0.05 * centre[2]])
        for _ in range(4):
            tried = centre + _STEPS * step
            templates = self.coverage(shape, *tried.T, covered.shape[0])
            match = np.maximum(np.einsum("nhw,hw->n", templates, covered), 0.0)
            explained = match**2 / np.maximum((templates**2).sum((1, 2)), 1e-6)
            k = int(explained.argmax())
            centre = tried[k]
            step = step / 2
        return float(centre[2]), float(explained[k]), templates[k]

    def _bank(self, side: int) -> tuple[np.ndarray, np.ndarray]:
        """Spectra [shape, radius, H, H / 2 + 1] of all shapes in the middle of a picture, and their
        energies [shape, radius]."""
        if side not in self._banks:
            middle = np.full(len(self._grid), side / 2)
            radii = self._grid * side
            bank = np.stack([self.coverage(s, middle, middle, radii, side) for s in self.shapes])
            self._banks[side] = np.fft.rfft2(bank), (bank**2).sum((2, 3))
        return self._banks[side]
