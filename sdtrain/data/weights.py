"""Read how often each picture is visited, from a column of the data set."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from sdtrain.data.captions import CaptionedPicture
from sdtrain.data.listing import shortened
from sdtrain.errors import DataError

COLUMN = "weight"
"""Column of a metadata file that holds the weights."""

LARGEST_SUM = 2.0**53
"""Sums of whole numbers up to this one are exact in float64."""


def weights_of(pictures: Sequence[CaptionedPicture]) -> list[float] | None:
    """Return the weight of each picture, or None if none has one.

    Raises DataError for a picture without a weight, and for a weight that is negative or not a
    finite number.
    """
    if all(_is_missing(picture.weight) for picture in pictures):
        return None
    missing = [picture.name for picture in pictures if _is_missing(picture.weight)]
    if missing:
        raise _weight_error(
            f"{len(missing)} of {len(pictures)} pictures have no weight, the others have one: "
            f"{shortened(missing)}",
            "Give each picture a weight (1 is one visit in a pass)",
        )
    weights = [_parse(picture) for picture in pictures]
    if sum(weights) > LARGEST_SUM:
        raise _weight_error(f"The weights sum to {sum(weights):g}; at most 2^53 is allowed")
    return weights


def weights_notes(weights: np.ndarray | None) -> list[str]:
    """Return a line for the user about the weights of the training pictures, if they have any.

    Raises DataError if all are 0.
    """
    if weights is None:
        return []
    if not weights.any():
        raise _weight_error("All training pictures have weight 0, so that none would be visited")
    never = int((weights == 0).sum())
    unvisited = f"; {never} have weight 0 and are not trained" if never else ""
    return [
        "Pictures are visited in proportion to their weights, which range from "
        f"{weights.min():g} to {weights.max():g}{unvisited}."
    ]


def _is_missing(value: Any) -> bool:
    return value is None or value == ""


def _parse(picture: CaptionedPicture) -> float:
    """Return the weight of a picture as a number. Raises DataError if it is none."""
    value = picture.weight
    try:
        if isinstance(value, bool):
            raise ValueError
        weight = float(value)
    except (TypeError, ValueError, OverflowError):
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise _weight_error(
            f"The weight of the picture {picture.name} is {value!r}; it must be a number of at "
            "least 0"
        )
    return weight


def _weight_error(problem: str, remedy: str = "Correct it") -> DataError:
    return DataError(
        problem,
        key="data.path",
        remedy=f"{remedy}, rename the column if it means something else, or change data.path.",
    )
