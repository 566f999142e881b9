"""Random masks for training a model that inpaints."""

import numpy as np

SMALLEST = 0.2
LARGEST = 0.8
"""Range of the sides of a rectangle, and of the part of a picture that a masked side covers."""

STROKES = 4
"""Most strokes of one mask."""

TURNS = 6
"""Most corners of one stroke."""

WIDTHS = (0.05, 0.2)
"""Range of the width of a stroke, as a share of the shorter side."""


def random_mask(draw: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Return a mask, bool [height, width], true where a picture is drawn anew.

    It is one of three kinds with equal probability: a rectangle, one side of the picture, or broad
    strokes (compare Suvorov et al. 2022, LaMa, section 2.3). It is neither empty nor full.
    """
    kinds = (_rectangle, _side, _strokes)
    kind = kinds[draw.integers(len(kinds))]
    mask = kind(draw, height, width)
    if mask.all() or not mask.any():
        return _side(draw, height, width)
    return mask


def _rectangle(draw: np.random.Generator, height: int, width: int) -> np.ndarray:
    mask = np.zeros((height, width), dtype=bool)
    sides = []
    for length in (height, width):
        side = max(1, round(draw.uniform(SMALLEST, LARGEST) * length))
        start = draw.integers(length - side + 1)
        sides.append(slice(start, start + side))
    mask[sides[0], sides[1]] = True
    return mask


def _side(draw: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Return a mask of the upper, lower, left or right part."""
    mask = np.zeros((height, width), dtype=bool)
    share = draw.uniform(SMALLEST, LARGEST)
    if draw.random() < 0.5:
        mask[: min(max(round(share * height), 1), height - 1)] = True
    else:
        mask[:, : min(max(round(share * width), 1), width - 1)] = True
    return np.ascontiguousarray(mask[::-1, ::-1]) if draw.random() < 0.5 else mask


def _strokes(draw: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Return a mask of all pixels near to one of several polylines."""
    y, x = np.mgrid[:height, :width] + 0.5
    distance = np.full((height, width), np.inf)
    for _ in range(draw.integers(1, STROKES + 1)):
        corners = draw.random((draw.integers(2, TURNS + 1), 2)) * (width, height)
        radius = draw.uniform(*WIDTHS) * min(height, width) / 2
        for start, end in zip(corners[:-1], corners[1:], strict=True):
            nearest = _distance_to_segment(x, y, start, end) - radius
            distance = np.minimum(distance, nearest)
    return distance <= 0


def _distance_to_segment(
    x: np.ndarray, y: np.ndarray, start: np.ndarray, end: np.ndarray
) -> np.ndarray:
    """Return the distance of the points (x, y) to a line segment."""
    along = end - start
    length = max(float(along @ along), 1e-12)
    place = ((x - start[0]) * along[0] + (y - start[1]) * along[1]) / length
    place = place.clip(0, 1)
    return np.hypot(x - start[0] - place * along[0], y - start[1] - place * along[1])
