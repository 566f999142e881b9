"""Confidence intervals from a few paired numbers: Student's t, and the difference of two arms."""

import math
from dataclasses import dataclass

from torch import Tensor

from sdtrain.evaluation.noise_level_error import standard_error

T_QUANTILES = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
    2.120,
    2.110,
    2.101,
    2.093,
    2.086,
)
"""The .975 quantiles of Student's t for 1, 2, ... degrees of freedom."""

NORMAL_QUANTILE = 1.959964
"""The .975 quantile of the normal distribution."""


def t_quantile(degrees_of_freedom: int) -> float:
    """Return the .975 quantile of Student's t distribution.

    Beyond the table it is the first terms of the expansion in 1 / n, accurate to 1e-3 (Abramowitz
    and Stegun 26.7.5), where n are the degrees of freedom and z the normal quantile:

        z + (z^3 + z) / (4 n) + (5 z^5 + 16 z^3 + 3 z) / (96 n^2).
    """
    n = degrees_of_freedom
    if n <= len(T_QUANTILES):
        return T_QUANTILES[n - 1]
    z = NORMAL_QUANTILE
    first = (z**3 + z) / (4 * n)
    second = (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
    return z + first + second


def standard_errors_to_95_percent(count: int) -> float:
    """Return how many standard errors the 95 % interval of a mean of `count` numbers extends."""
    return t_quantile(max(1, count - 1))


def confidence_half_width(values: Tensor) -> float:
    """Return half the width of the 95 % interval of the mean of values [N], infinite for N = 1."""
    return standard_errors_to_95_percent(len(values)) * standard_error(values)


@dataclass
class Difference:
    """Bits of an arm minus those of the baseline, with a 95 % confidence interval.

    half_width: half the width of the interval.
    samples: what the mean and the interval are taken over, "pictures" or "seeds".
    seed_range: the lower and the higher difference where there are two seeds, too few for an
        interval over them; otherwise None.
    unpaired_half_width: the half width that would result if the two arms had been measured on
        different pictures with different noise.
    """

    mean: float
    half_width: float
    samples: str
    seed_range: tuple[float, float] | None = None
    unpaired_half_width: float = math.nan

    @property
    def is_zero(self) -> bool:
        """Whether the arms are exactly equal, as two runs that train the same are."""
        return self.mean == 0 and not self.half_width

    @property
    def is_significant(self) -> bool:
        """Whether the interval excludes 0 and, of two seeds, both differences have one sign."""
        if self.seed_range is not None:
            low, high = self.seed_range
            has_one_sign = low * high > 0
            if not has_one_sign:
                return False
        return abs(self.mean) > self.half_width
