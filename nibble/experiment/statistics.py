"""Means over seeds, how far they can be trusted, and whether two methods differ.

    estimate(values)              mean and 95 % interval over independent runs
    difference(ours, theirs)      the same of ours - theirs, seed by seed
    proportion(3, 10)             a share and its 95 % interval over independent rows

The interval of a mean is Student's: mean +- t * s / sqrt(n), with s over n - 1. That of a share is
Wilson's.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist, fmean, stdev
from typing import Any

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean with the ends of its interval; a single value has none."""

    value: float
    low: float | None
    high: float | None
    num_values: int

    @property
    def half_width(self) -> float | None:
        """Half of the interval."""
        return None if self.high is None else self.high - self.value

    @property
    def is_apart_from_0(self) -> bool:
        """Whether 0 lies outside of the interval; a single value tells nothing."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high

    def to_dict(self) -> dict[str, Any]:
        """As report.json has it."""
        return {"value": self.value, "low": self.low, "high": self.high}


def estimate(values: Sequence[float]) -> Estimate | None:
    """The mean and its interval; None without values.

    >>> e = estimate([1.0, 2.0, 3.0])
    >>> round(e.value, 3), round(e.low, 3), round(e.high, 3)
    (2.0, -0.484, 4.484)
    """
    if not values:
        return None
    mean = fmean(values)
    if len(values) == 1:
        return Estimate(mean, None, None, 1)
    half = t_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return Estimate(mean, mean - half, mean + half, len(values))


def difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Estimate | None:
    """Ours less theirs over the seeds that both have: what a seed adds to both cancels out."""
    return estimate([ours[seed] - theirs[seed] for seed in ours if seed in theirs])


def proportion(num_hits: int, num_rows: int) -> Estimate | None:
    """A share of rows and its interval; None without rows.

        (p + z^2 / 2n +- z * sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n),  z = 1.96

    Source:
        Wilson 1927, Journal of the American Statistical Association 22, 209-212.

    >>> e = proportion(8, 10)
    >>> round(e.value, 3), round(e.low, 3), round(e.high, 3)
    (0.8, 0.49, 0.943)
    """
    if num_rows == 0:
        return None
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    share, squared = num_hits / num_rows, z * z / num_rows
    middle = (share + squared / 2) / (1 + squared)
    half = z * math.sqrt(share * (1 - share) / num_rows + squared / num_rows / 4) / (1 + squared)
    # At a share of 0 or 1 rounding alone would leave that end beside it.
    low, high = min(share, middle - half), max(share, middle + half)
    return Estimate(share, 0.0 if num_hits == 0 else low, high, num_rows)


@cache
def t_quantile(degrees: int, confidence: float = CONFIDENCE) -> float:
    """The t within which Student's distribution has `confidence` of its mass.

    >>> round(t_quantile(2), 3), round(t_quantile(9), 3)
    (4.303, 2.262)
    """
    low, high = 0.0, 1.0
    while t_mass(high, degrees) < confidence:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        is_below = t_mass(middle, degrees) < confidence
        low, high = (middle, high) if is_below else (low, middle)
    return high


def t_mass(t: float, degrees: int) -> float:
    """The mass of Student's distribution between -t and t, a finite sum for whole degrees.

        odd:   2/pi * (a + sin a * (cos a + 2/3 cos^3 a + 2*4/(3*5) cos^5 a + ...))
        even:  sin a * (1 + 1/2 cos^2 a + 1*3/(2*4) cos^4 a + ...),  tan a = t / sqrt(degrees)

    Args:
        t: At least 0.
        degrees: Of freedom, at least 1.

    Source:
        Abramowitz and Stegun 1964, equations 26.7.3 and 26.7.4.
    """
    angle = math.atan(t / math.sqrt(degrees))
    cos_squared = math.cos(angle) ** 2
    is_odd = degrees % 2 == 1
    term = math.cos(angle) if is_odd else 1.0
    total = 0.0 if degrees == 1 else term
    for above in range(2 if is_odd else 1, degrees - 2, 2):
        term *= cos_squared * above / (above + 1)
        total += term
    mass = math.sin(angle) * total
    return 2 / math.pi * (angle + mass) if is_odd else mass
