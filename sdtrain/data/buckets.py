"""Aspect-ratio buckets: picture sizes of about one area, and which picture gets which of them.

Each picture is resized and cropped to the size whose shape is nearest to its own, so that less of
it is lost than in a square, and a batch is drawn from one bucket (NovelAI 2022, "NovelAI
improvements on Stable Diffusion").
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sdtrain.errors import UserError

Size = tuple[int, int]
"""(width, height) in pixels."""


@dataclass(frozen=True)
class Buckets:
    """The buckets of a split.

    sizes: of the buckets, from the narrowest to the widest; none is empty. bucket_of: [N] int, the
    number of each picture's bucket, by index. visits: how many visits a pass over the data makes to
    each bucket; without weights, its number of pictures. note: a line for the user about sizes and
    cropping.
    """

    sizes: tuple[Size, ...]
    bucket_of: np.ndarray
    visits: tuple[int, ...]
    note: str = ""

    def size_of(self, index: int) -> Size:
        """Return the size that the picture of this index is cropped to."""
        return self.sizes[self.bucket_of[index]]

    def members(self) -> list[np.ndarray]:
        """Return the indices of the pictures of each bucket, rising."""
        return [np.flatnonzero(self.bucket_of == bucket) for bucket in range(len(self.sizes))]


def buckets_of(split: Any) -> Buckets | None:
    """Return the buckets of a split, None if all of its pictures have one size."""
    return getattr(split, "buckets", None)


def bucket_notes(buckets: Buckets | None) -> list[str]:
    """Return the line for the user about the buckets of a split, if it has any."""
    return [] if buckets is None else [buckets.note]


def bucket_chooser(
    buckets: bool, image_size: int, step: int | None, max_ratio: float, batch_size: int
) -> Callable[[np.ndarray, np.ndarray | None], Buckets] | None:
    """Return the function (sizes of pictures, their weights or None) -> buckets, None if the
    pictures should be squares.

    Raises UserError for options with which there are no buckets.

    Args:
        buckets: whether they are wanted.
        image_size: side in pixels of the square whose area they have.
        step: divides image_size and all sides; None: `default_step` without a model.
        max_ratio: of the longer side to the shorter one.
        batch_size: pictures of one optimizer step.
    """
    if not buckets:
        return None
    check_bucket_options(image_size, step, max_ratio)
    if step is None:
        step = default_step(image_size)
    sizes = bucket_sizes(image_size, step, max_ratio)

    def choose(pictures: np.ndarray, weights: np.ndarray | None) -> Buckets:
        return make_buckets(pictures, sizes, weights=weights, batch_size=batch_size)

    return choose


def check_bucket_options(image_size: int, step: int | None, max_ratio: float) -> None:
    """Raise UserError for options with which there are no buckets."""
    if step is not None and not 1 <= step <= image_size:
        raise UserError(
            f"must be at least 1 and at most data.image_size={image_size}",
            key="data.bucket_step",
            value=step,
            remedy="Change data.bucket_step.",
        )
    if not 1 <= max_ratio < math.inf:
        raise UserError(
            "must be a finite number of at least 1",
            key="data.bucket_max_ratio",
            value=max_ratio,
            remedy="Change data.bucket_max_ratio.",
        )
    if step is not None and image_size % step:
        steps = [str(each) for each in _useful_steps(image_size, max_ratio)]
        others = f" to a divisor such as {', '.join(steps[:FEW_STEPS])}" if steps else ""
        raise UserError(
            f"must divide data.image_size={image_size}, which is the side of the square",
            key="data.bucket_step",
            value=step,
            remedy=f"Change data.bucket_step{others}, or change data.image_size.",
        )
    if step is not None and len(bucket_sizes(image_size, step, max_ratio)) == 1:
        raise UserError(
            f"leaves squares only, with data.image_size={image_size} and "
            f"data.bucket_max_ratio={max_ratio:g}",
            key="data.bucket_step",
            value=step,
            remedy="Lower data.bucket_step, raise data.bucket_max_ratio, or set "
            "data.buckets=false.",
        )


def _useful_steps(image_size: int, max_ratio: float) -> list[int]:
    """Return the divisors of image_size that leave more than squares, the largest first."""
    steps = []
    for step in range(image_size, 0, -1):
        if image_size % step == 0 and len(bucket_sizes(image_size, step, max_ratio)) > 1:
            steps.append(step)
    return steps


def nearest_size(picture: Size, sizes: Sequence[Size]) -> Size:
    """Return which of the sizes has the shape, as log(width / height), nearest to a picture's."""
    return sizes[int(_nearest(_log_ratios([picture]), sizes)[0])]


AREA_TOLERANCE = 0.2
"""By how much of image_size^2 the area of a size may differ from it."""

FEW_STEPS = 4
"""How many steps a message names."""

LARGEST_STEP = 64
"""Largest step that is chosen, in pixels. Stable Diffusion halves its pictures six times."""


def default_step(image_size: int, downsampling: int = 1, unet_downsampling: int = 1) -> int:
    """Return a step for the sides of buckets: the largest divisor of image_size that is at most
    image_size / 8 and LARGEST_STEP pixels.

    It is a multiple of the autoencoder's downsampling, which divides image_size. It is also a
    multiple of the UNet's own as far as it then still divides image_size and is at most
    image_size / 4; with a larger one, there would be hardly any shapes but the square. The UNet's
    own is a power of 2.
    """
    unit = downsampling * unet_downsampling
    while unit > downsampling and (unit > image_size / 4 or image_size % unit):
        unit //= 2
    for step in range(min(LARGEST_STEP, image_size // 8) // unit * unit, unit, -unit):
        if image_size % step == 0:
            return step
    return unit


def bucket_sizes(image_size: int, step: int, max_ratio: float) -> list[Size]:
    """Return the sizes of all buckets, from the narrowest to the widest.

    `step` divides image_size, so that the square is image_size x image_size. There is a size for
    each width that is a multiple of `step`, with the multiple of `step` as
    height that brings the area nearest to image_size^2, unless that is off by more than
    AREA_TOLERANCE. No side is more than `max_ratio` times the other.
    """
    wide = []
    width = image_size + step
    while width * step <= (1 + AREA_TOLERANCE) * image_size**2:
        height = max(1, round(image_size**2 / width / step)) * step
        if width > max_ratio * height:  # and so are all wider ones
            break
        error = abs(width * height / image_size**2 - 1)
        if width > height and error <= AREA_TOLERANCE:
            wide.append((width, height))
        width += step
    tall = [(height, width) for width, height in reversed(wide)]
    return [*tall, (image_size, image_size), *wide]


def make_buckets(
    pictures: Sequence[Size],
    sizes: Sequence[Size],
    *,
    weights: Sequence[float] | None,
    batch_size: int,
) -> Buckets:
    """Give each picture the size whose shape, as log(width / height), is nearest to its own.

    A bucket with fewer visits than a batch has pictures is dissolved, the smallest first, and its
    pictures go to the nearest of the others: else a batch would show a picture more than once.

    Args:
        pictures: (width, height) of each picture.
        sizes: of the buckets, from the narrowest to the widest.
        weights: how often each picture is visited, compared with the others; None: equally.
        batch_size: pictures of one optimizer step.
    """
    shapes = _log_ratios(pictures)
    kept = list(sizes)
    nearest = _nearest(shapes, kept)
    asked_for = np.asarray(sizes)[nearest]
    while True:
        visits = _visits(nearest, weights, len(kept))
        smallest = int(visits.argmin())
        if visits[smallest] >= batch_size or len(kept) == 1:
            break
        del kept[smallest]
        nearest = _nearest(shapes, kept)
    joined = int((asked_for != np.asarray(kept)[nearest]).any(1).sum())
    note = _note(shapes, kept, nearest)
    if joined:
        note += (
            f"; {joined} of {len(shapes)} pictures joined another size than their nearest, which "
            f"has fewer than data.batch_size={batch_size}"
        )
    return Buckets(tuple(kept), nearest.astype(np.int16), tuple(visits.tolist()), f"{note}.")


def _visits(bucket_of: np.ndarray, weights: Sequence[float] | None, count: int) -> np.ndarray:
    """Return how many visits a pass over the data makes to each of `count` buckets, [count] int."""
    if weights is None or min(weights) == max(weights):
        return np.bincount(bucket_of, minlength=count)
    sums = np.bincount(bucket_of, weights, count)
    # As in `Visits`, a pass has at least as many visits as there are pictures to visit.
    total = max(round(sums.sum()), np.count_nonzero(weights))
    return np.rint(sums * (total / sums.sum())).astype(np.int64)


def _log_ratios(sizes: Sequence[Size]) -> np.ndarray:
    """Return log(width / height) of each size, [N] float64."""
    sides = np.asarray(sizes, dtype=np.float64)
    return np.log(sides[:, 0] / sides[:, 1])


def _nearest(shapes: np.ndarray, sizes: Sequence[Size]) -> np.ndarray:
    """Return the number of the size that is nearest to each shape, [N] int."""
    of_sizes = _log_ratios(sizes)
    return np.searchsorted((of_sizes[1:] + of_sizes[:-1]) / 2, shapes)


def _note(shapes: np.ndarray, sizes: Sequence[Size], nearest: np.ndarray) -> str:
    """Return a line that tells the sizes, and the pixels lost with them and with squares."""
    # A picture of ratio r that covers a size of ratio q and is cropped to it loses
    # 1 - min(r / q, q / r) of its pixels.
    lost = 1 - np.exp(-np.abs(shapes - _log_ratios(sizes)[nearest])).mean()
    lost_in_squares = 1 - np.exp(-np.abs(shapes)).mean()
    first = f"{sizes[0][0]}x{sizes[0][1]}"
    last = f"{sizes[-1][0]}x{sizes[-1][1]}"
    named = f"1 size, {first}" if len(sizes) == 1 else f"{len(sizes)} sizes from {first} to {last}"
    return (
        f"data.buckets: {named} (width x height); {lost:.1%} of the pixels are cropped away, "
        f"{lost_in_squares:.1%} with squares"
    )
