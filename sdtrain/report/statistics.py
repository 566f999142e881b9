"""What can be told from a few paired numbers: Student's t, and a difference with its interval."""

import math
from dataclasses import dataclass

from torch import Tensor

from sdtrain.evaluation.noise_level_error import standard_error

T = (
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
"""Quantiles .975 of Student's t by degrees of freedom, from 1 on."""

NORMAL = 1.959964
"""Quantile .975 of the normal distribution."""


def t_quantile(freedom: int) -> float:
    """Quantile .975 of Student's t with so many degrees of freedom.

    Beyond the table by the first terms of its expansion in 1 / freedom, right to 1e-3 (Abramowitz
    and Stegun 26.7.5):

        z + (z^3 + z) / (4 n) + (5 z^5 + 16 z^3 + 3 z) / (96 n^2).
    """
    if freedom <= len(T):
        return T[freedom - 1]
    z = NORMAL
    first = (z**3 + z) / (4 * freedom)
    second = (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    return z + first + second


def quantile_for(count: int) -> float:
    """Half a 95 % interval of the mean of `count` numbers, in standard errors."""
    return t_quantile(max(1, count - 1))


def half_width(values: Tensor) -> float:
    """Half the 95 % interval of the mean of values [N]; infinite for one alone."""
    return quantile_for(len(values)) * standard_error(values)


@dataclass
class Difference:
    """Bits of an arm minus the baseline's, with a 95 % interval.

    half: half the interval's width.
    over: what it is taken over, "pictures" or "seeds".
    spread: the lower and the higher of two seeds' means, too few for an interval over them.
    unpaired_half: half the width, had each arm its own pictures and noise.
    """

    mean: float
    half: float
    over: str
    spread: tuple[float, float] | None = None
    unpaired_half: float = math.nan

    @property
    def is_zero(self) -> bool:
        """Exactly: of two runs that train the same."""
        return self.mean == 0 and not self.half

    @property
    def told(self) -> bool:
        """Whether it can be told from nothing; two seeds that disagree in its sign cannot."""
        agree = self.spread is None or self.spread[0] * self.spread[1] > 0
        return abs(self.mean) > self.half and agree
