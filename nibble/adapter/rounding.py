"""What rounding leaves of an update when it is added to weights that are stored in few bits.

    kept   = <written - base, update> / <update, update>      1: all of it, 0: none
    error  = rms(written - (base + update))
    step   = rms distance of neighbouring values that the storage has

bfloat16 has 8 bits: the step of a value in [2^e, 2^(e+1)) is 2^(e-7). The 16 values of a block in
4 bits span twice its scale: their mean step is 2/15 of it.
"""

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from nibble.kernels.nf4 import Quantized
from nibble.kernels.nf4_reference import dequantize_scales

# Below this share of the update, or above this ratio of error to update, it is lost.
LEAST_KEPT = 0.5
MOST_ERROR = 2.0
_BITS = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}


@dataclass
class Rounding:
    """Sums over the weights that are adapted, in squares but for `along`."""

    update: float = 0.0
    error: float = 0.0
    step: float = 0.0
    along: float = 0.0
    num_values: int = 0

    def add(self, written: Tensor, base: Tensor, update: Tensor) -> None:
        """Count some values; all float32 and of one shape. `base` is overwritten."""
        change = base.sub_(written).neg_()
        self.along += _dot(change, update)
        self.error += _dot(change.sub_(update), change)
        self.update += _dot(update, update)
        self.num_values += update.numel()

    def add_dense_step(self, written: Tensor) -> None:
        """Count the steps of values that are stored in their own type."""
        bits, (_, exponent) = _BITS[written.dtype], torch.frexp(written.float())
        step = torch.ldexp(torch.ones_like(written, dtype=torch.float32), exponent - bits)
        self.step += _dot(step, step)

    def add_quantized_step(self, q: Quantized) -> None:
        """Count the steps of a weight in 4 bits."""
        scale_N = dequantize_scales(q, 0, q.absmax.numel()) * (2 / 15)
        self.step += _dot(scale_N, scale_N) * q.block_size

    def __iadd__(self, other: "Rounding") -> "Rounding":
        for part in fields(self):
            setattr(self, part.name, getattr(self, part.name) + getattr(other, part.name))
        return self

    def rms(self, name: str) -> float:
        """The root of the mean of "update", "error" or "step"."""
        return math.sqrt(getattr(self, name) / max(1, self.num_values))

    @property
    def kept(self) -> float:
        """The share of the update that the written weights have; 1 of no update."""
        return self.along / self.update if self.update else 1.0

    @property
    def is_lost(self) -> bool:
        """Whether rounding takes the update away, or covers it."""
        is_covered = self.error > MOST_ERROR**2 * self.update
        return bool(self.update) and (self.kept < LEAST_KEPT or is_covered)

    def to_dict(self) -> dict[str, Any]:
        """The figures for a certificate."""
        return {
            "update_rms": self.rms("update"),
            "rounding_step_rms": self.rms("step"),
            "rounding_error_rms": self.rms("error"),
            "kept": self.kept,
            "num_values": self.num_values,
        }


def _dot(a: Tensor, b: Tensor) -> float:
    """The sum of products, added in float64 over blocks that are summed in float32."""
    return float(torch.dot(a.flatten(), b.flatten()))
