"""Read how often each picture is visited, from a column of the data set."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sdtrain.data.captions import CaptionedPicture
from sdtrain.data.listing import shortened
from sdtrain.errors import DataError

LARGEST_SUM = 2.0**53
"""Sums of whole numbers up to this one are exact in float64."""


@dataclass(frozen=True)
class WeightColumn:
    """Where the weights of a data set are, for messages.

    key: that says so. remedy: what helps beside correct values. location: a function (name of a
    picture) -> words for the place of its row.
    """

    key: str
    remedy: str
    location: Callable[[str], str]

    def error(self, problem: str, remedy: str = "Correct it") -> DataError:
        return DataError(problem, key=self.key, remedy=f"{remedy}, {self.remedy}.")


def weights_of(pictures: Sequence[CaptionedPicture], column: WeightColumn) -> list[float] | None:
    """Return the weight of each picture, or None if none has one.

    Raises DataError for a picture without a weight, and for a weight that is negative or not a
    finite number.
    """
    if all(_is_missing(picture.weight) for picture in pictures):
        return None
    missing = [picture.name for picture in pictures if _is_missing(picture.weight)]
    if missing:
        raise column.error(
            f"{len(missing)} of {len(pictures)} pictures have no weight, the others have one: "
            f"{shortened(missing)}. The first is in {column.location(missing[0])}",
            "Give each picture a weight (1 is one visit in a pass)",
        )
    weights = [_parse(picture, column) for picture in pictures]
    if sum(weights) > LARGEST_SUM:
        raise column.error(f"The weights sum to {sum(weights):g}; at most 2^53 is allowed")
    return weights


def check_some_are_trained(weights: np.ndarray | None, column: WeightColumn) -> None:
    """Raise DataError if all training pictures have weight 0.

    weights: float64 [N], or None if they have none.
    """
    if weights is not None and not weights.any():
        raise column.error(
            "All training pictures have weight 0, so that none would be visited",
            "Give some a larger one",
        )


def weights_notes(weights: np.ndarray | None) -> list[str]:
    """Return a line for the user about the weights of the training pictures, if they have any.

    weights: float64 [N].
    """
    if weights is None:
        return []
    if weights.min() == weights.max():
        return [f"All training pictures have the same weight, {weights.min():g}."]
    never = int((weights == 0).sum())
    unvisited = f"; {never} have weight 0 and are not trained" if never else ""
    return [
        "Pictures are visited in proportion to their weights, which range from "
        f"{weights.min():g} to {weights.max():g}{unvisited}."
    ]


def _is_missing(value: Any) -> bool:
    return value is None or value == ""


def _parse(picture: CaptionedPicture, column: WeightColumn) -> float:
    """Return the weight of a picture as a number. Raises DataError if it is none."""
    value = picture.weight
    try:
        if isinstance(value, bool):
            raise ValueError
        weight = float(value)
    except (TypeError, ValueError, OverflowError):
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise column.error(
            f"The weight of a picture is {value!r}, in {column.location(picture.name)}; it must "
            "be a finite number of at least 0"
        )
    return weight
