"""The type in which a device multiplies matrices of bfloat16 fastest.

A product of two bfloat16 values is exact in float32. Whether the factors are widened first or not,
sums run in float32 and are rounded once; only their order differs. Some CPUs without matrix units
multiply float32 twice as fast.
"""

import time
from functools import cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from nibble.kernels.target import device_type

# Rows, depth and columns of the product that is timed, and how often.
_SIZES = (256, 1024, 1024)
_TIMES = 5
# Widening has to pay for the conversions too.
_LEAST_GAIN = 1.25
# Vectors multiply bfloat16 twice as fast as float32 at most, matrix units eight times or more.
_MATRIX_GAIN = 4.0


def product_dtype(x: Tensor) -> torch.dtype:
    """The type that `x` and what it is multiplied by should be converted to."""
    is_narrow = x.dtype == torch.bfloat16 and device_type(x) == "cpu"
    return cpu_product_dtype() if is_narrow else x.dtype


def cpu_product_dtype() -> torch.dtype:
    """float32 where this CPU multiplies it much faster than bfloat16, else bfloat16."""
    return torch.float32 if _float32_gain() > _LEAST_GAIN else torch.bfloat16


def has_matrix_units() -> bool:
    """Whether this CPU multiplies bfloat16 so fast that sums in float32 vectors fall behind."""
    return 1 / _float32_gain() > _MATRIX_GAIN


@cache
def _float32_gain() -> float:
    """How many times as fast as bfloat16 this CPU multiplies float32."""
    with _disable_current_modes(), torch.no_grad(), torch.autocast("cpu", enabled=False):
        seconds = {dtype: _seconds(dtype) for dtype in (torch.bfloat16, torch.float32)}
    return seconds[torch.bfloat16] / seconds[torch.float32]


def _seconds(dtype: torch.dtype) -> float:
    """The shortest time of a product."""
    num_rows, depth, num_columns = _SIZES
    left, right = torch.ones(num_rows, depth, dtype=dtype), torch.ones(num_columns, depth).to(dtype)
    best = float("inf")
    for _ in range(_TIMES + 1):
        start = time.perf_counter()
        torch.mm(left, right.T)
        best = min(best, time.perf_counter() - start)
    return best
