"""Block scales of least squared error in place of the largest magnitude: the reference.

A block w of Q values with levels c (its code values) and scale s leaves the squared error

    |w - s c|^2 = <w, w> - 2 s <w, c> + s^2 <c, c>

For given c the best scale is <w, c> / <c, c>, which gains <w, c>^2 / <c, c>; for a given s the best
levels are those nearest to w / s. Several s are tried, on both sides of zero, since the levels of
NF4 lie closer above zero than below; the best is then refined by turns.

The format stays as it is: a scale may be any float32, and 8-bit scales have both signs as well.
Sums run in sixteen lanes, each in order, and the lanes are added by halves: the bits are the same
on every path and for every number of threads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nibble.kernels.nf4_reference import ASCENDING, CODEBOOKS, bounds

# Of the largest magnitude; blocks of 4,096 have their best scale at the lower end.
FACTORS = torch.tensor(
    [0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2, 1.3]
)  # fmt: skip
NUM_REFITS = 2
# Beyond these a scale or its reciprocal may round coarsely: such blocks keep the plain scale.
SMALLEST, LARGEST = 2.0**-100, 2.0**100
# What a scale must gain a value, in squares of the largest magnitude: more than rounding can hide.
LEAST_GAIN = 2.0**-20
_NUM_LANES = 16


def levels(type: str) -> Tensor:
    """The 16 code values, ascending."""
    return CODEBOOKS[type][list(ASCENDING[type])]


def search_reference(
    values: Tensor, absmax_N: Tensor, scale_N: Tensor, *, type: str, block_size: int
) -> None:
    """Write to `scale_N` the scale of least squared error of each block, or its absmax.

    Shapes:
        values: 1-D. absmax_N, scale_N: (ceil(numel / block_size),) float32.
    """
    value_NQ = F.pad(values.float(), (0, -values.numel() % block_size)).view(-1, block_size)
    is_normal_N = (absmax_N >= SMALLEST) & (absmax_N <= LARGEST)
    value_NQ = value_NQ * (1.0 / absmax_N.where(is_normal_N, 1.0))[:, None]
    factor_N, gain_N = torch.ones_like(absmax_N), torch.zeros_like(absmax_N)
    for sign in (1.0, -1.0):
        for factor in FACTORS.tolist():
            tried_N = torch.full_like(absmax_N, factor * sign)
            factor_N, gain_N = _better(value_NQ, tried_N, factor_N, gain_N, type)
    for _ in range(NUM_REFITS):
        factor_N, gain_N = _better(value_NQ, factor_N, factor_N, gain_N, type)
    saved_N = _error(value_NQ, torch.ones_like(factor_N), type)
    saved_N -= _error(value_NQ, factor_N, type)
    is_better_N = is_normal_N & (saved_N > block_size * LEAST_GAIN)
    scale_N.copy_((factor_N * absmax_N).where(is_better_N, absmax_N))


def _better(
    value_NQ: Tensor, tried_N: Tensor, factor_N: Tensor, gain_N: Tensor, type: str
) -> tuple[Tensor, Tensor]:
    """The best factor of the levels at `tried_N` and its gain, where that is above `gain_N`."""
    level_NQ = _levels_at(value_NQ, tried_N, type)
    product_N, square_N = _sum(value_NQ * level_NQ), _sum(level_NQ * level_NQ)
    new_gain_N = product_N * product_N / square_N
    is_better_N = new_gain_N > gain_N
    return (
        (product_N / square_N).where(is_better_N, factor_N),
        new_gain_N.where(is_better_N, gain_N),
    )


def _error(value_NQ: Tensor, factor_N: Tensor, type: str) -> Tensor:
    """The squared error of each block at this factor and the levels nearest to it."""
    rest_NQ = value_NQ - factor_N[:, None] * _levels_at(value_NQ, factor_N, type)
    return _sum(rest_NQ * rest_NQ)


def _levels_at(value_NQ: Tensor, factor_N: Tensor, type: str) -> Tensor:
    """The level nearest to value / factor, of a negative factor that nearest to -value / -factor.

    A value on a bound takes the lower level.
    """
    magnitude_N1, level = factor_N.abs()[:, None], levels(type).tolist()
    value_NQ = value_NQ.where(factor_N[:, None] > 0, -value_NQ)
    level_NQ = torch.full_like(value_NQ, level[0])
    for bound, above in zip(bounds(type).tolist(), level[1:], strict=True):
        level_NQ.masked_fill_(value_NQ > magnitude_N1 * bound, above)
    return level_NQ


def _sum(term_NQ: Tensor) -> Tensor:
    """Sums of rows: each of sixteen lanes in order, then halves of the lanes onto each other."""
    first, *rest = term_NQ.unflatten(1, (-1, _NUM_LANES)).unbind(1)
    lane_NL = first.clone()
    for part in rest:
        lane_NL += part
    while lane_NL.shape[1] > 1:
        low, high = lane_NL.chunk(2, dim=1)
        lane_NL = low + high
    return lane_NL[:, 0]
