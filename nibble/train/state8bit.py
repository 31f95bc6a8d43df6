"""How the two moments of AdamW are stored: in 32 bits, or in 8 bits by blocks.

    bits   bytes a value    a moment of Q = 256 values
    32     8                float32
    8      2.03             value = MAP[code] * scale      one code a value, one scale a block

Both formats have the same three things: `parts`, the flat tensors they consist of; `decode`,
the moments in float32; `encode`, which writes them back. The 8-bit maps have seven decades each;
the second moment is never negative, and its map has twice the steps instead of a sign.

Source:
    Dettmers et al. 2022, arXiv:2110.02861, sections 1.3 and 2.2.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from nibble.kernels.nf4_reference import DYNAMIC_MAP

BLOCK_SIZE = 256
Parts = Mapping[str, Tensor]


@dataclass(frozen=True)
class Part:
    """A flat tensor of the stored moments: one element for every `num_values` values."""

    name: str
    dtype: torch.dtype
    num_values: int = 1

    def of(self, values: slice) -> slice:
        """The elements of a range of values that starts at a block.

        >>> Part("exp_avg.scale", torch.float32, 256).of(slice(512, 1000))
        slice(2, 4, None)
        """
        return slice(values.start // self.num_values, -(-values.stop // self.num_values))

    def count(self, num_values: int) -> int:
        """Elements that so many values need."""
        return -(-num_values // self.num_values)


class MomentFormat(Protocol):
    """What the optimizer asks of a format. All zero bytes stand for all zero moments."""

    @property
    def parts(self) -> tuple[Part, ...]: ...
    def decode(self, parts: Parts) -> tuple[Tensor, Tensor]: ...
    def encode(self, exp_avg: Tensor, exp_avg_sq: Tensor, parts: Parts) -> None: ...


class Moments32:
    """Both moments as they are, updated in place."""

    parts = (Part("exp_avg", torch.float32), Part("exp_avg_sq", torch.float32))

    def decode(self, parts: Parts) -> tuple[Tensor, Tensor]:
        """The stored tensors themselves."""
        return parts["exp_avg"], parts["exp_avg_sq"]

    def encode(self, exp_avg: Tensor, exp_avg_sq: Tensor, parts: Parts) -> None:
        """Nothing: they are stored already."""


class Moments8:
    """Both moments in 8 bits; the caller bounds the float32 copies by the range it decodes.

    A second moment above zero is never stored as zero but as the smallest step: dividing by the
    root of a zero would turn the smallest first moment into a step of m / eps.

    Source:
        Li et al. 2023, arXiv:2309.01507, section 4.1 (the zero-point problem).
    """

    parts = (
        Part("exp_avg.scale", torch.float32, BLOCK_SIZE),
        Part("exp_avg_sq.scale", torch.float32, BLOCK_SIZE),
        Part("exp_avg.codes", torch.uint8),
        Part("exp_avg_sq.codes", torch.uint8),
    )

    def __init__(self, device: torch.device) -> None:
        signed, unsigned = midpoints(SIGNED_MAP), midpoints(UNSIGNED_MAP)
        unsigned[0] = 0.0
        self._codes = {
            "exp_avg": BlockCode(SIGNED_MAP, signed, device),
            "exp_avg_sq": BlockCode(UNSIGNED_MAP, unsigned, device),
        }

    def decode(self, parts: Parts) -> tuple[Tensor, Tensor]:
        """Both moments in float32, in new tensors."""
        exp_avg, exp_avg_sq = (
            code.dequantize(parts[f"{name}.codes"], parts[f"{name}.scale"])
            for name, code in self._codes.items()
        )
        return exp_avg, exp_avg_sq

    def encode(self, exp_avg: Tensor, exp_avg_sq: Tensor, parts: Parts) -> None:
        """Write the nearest codes and the scales."""
        for name, values in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
            codes, scale_N = self._codes[name].quantize(values)
            parts[f"{name}.codes"].copy_(codes)
            parts[f"{name}.scale"].copy_(scale_N)


class BlockCode:
    """Flat float32 tensors in 8 bits a value and one float32 scale for every 256.

    The scale of a block is its value of largest magnitude, with its sign: that value takes the
    code of 1 and is kept exactly, so that quantising twice changes nothing.

    Args:
        map: What the 256 codes stand for, ascending up to 1.
        bounds: The 255 numbers between two codes; on a bound the lower code is taken.
    """

    def __init__(self, map: Sequence[float], bounds: Sequence[float], device: torch.device) -> None:
        self._map = torch.tensor(map, device=device)
        # No number is above the last bound, so that every code has a bound.
        self._bounds = torch.tensor([*bounds, torch.inf], device=device)
        # The upper half of a float32 leaves a cell of numbers with at most one bound in it: the
        # code of its lower end is right up to that bound. A search takes several times as long.
        cells = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32, device=device) << 16
        ends = torch.stack([cells, cells | 0xFFFF]).view(torch.float32)
        self._code_of_cell = torch.bucketize(ends.amin(0), self._bounds[:-1], out_int32=True)

    def quantize(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """(numel,) float32 -> codes (numel,) uint8 and scales (ceil(numel / 256),) float32."""
        num_missing = -values.numel() % BLOCK_SIZE
        padded = F.pad(values, (0, num_missing)) if num_missing else values
        value_NQ = padded.view(-1, BLOCK_SIZE)
        low_N, high_N = value_NQ.amin(-1), value_NQ.amax(-1)
        scale_N = torch.where(high_N >= -low_N, high_N, low_N)
        # A subnormal scale has no exact inverse; its block counts as zero.
        scale_N = torch.where(scale_N.abs() < torch.finfo(torch.float32).tiny, 0.0, scale_N)
        divisor_N = torch.where(scale_N == 0, torch.inf, scale_N)
        ratio = (value_NQ / divisor_N[:, None]).view(-1)[: values.numel()]
        return self._nearest(ratio), scale_N

    def dequantize(self, codes: Tensor, scale_N: Tensor) -> Tensor:
        """The values of codes in float32: map[code] * scale, rounded once."""
        scale = scale_N.repeat_interleave(BLOCK_SIZE)[: codes.numel()]
        return self._map.index_select(0, codes.int()).mul_(scale)

    def _nearest(self, ratio: Tensor) -> Tensor:
        cell = (ratio.view(torch.int32) >> 16).add_(1 << 15)
        code = self._code_of_cell.index_select(0, cell)
        is_above = ratio > self._bounds.index_select(0, code)
        return code.add_(is_above).to(torch.uint8)


def midpoints(map: Sequence[float]) -> list[float]:
    """The numbers halfway between neighbours."""
    return [(low + high) / 2 for low, high in pairwise(map)]


def _build_unsigned_map() -> tuple[float, ...]:
    """The 256 values of the 8-bit dynamic type without a sign, ascending.

    Decade d = -6 ... 0 holds 2^(d+7) values, the midpoints of equal parts of [0.1, 1] * 10^d;
    then 0 and 1. So 2 * (1 + 2 + ... + 64) + 2 = 256.
    """
    values = [0.0, 1.0]
    for decade in range(-6, 1):
        num_parts = 2 ** (decade + 7)
        middles = [0.1 + 0.9 * (part + 0.5) / num_parts for part in range(num_parts)]
        values += [middle * 10.0**decade for middle in middles]
    return tuple(sorted(values))


SIGNED_MAP: tuple[float, ...] = tuple(DYNAMIC_MAP.tolist())
UNSIGNED_MAP = _build_unsigned_map()
