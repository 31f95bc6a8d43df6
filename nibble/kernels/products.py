"""The type in which a device multiplies matrices of bfloat16 fastest.

A product of two bfloat16 values is exact in float32. Whether the factors are widened first or not,
sums run in float32 and are rounded once; only their order differs. Some CPUs without matrix units
multiply float32 twice as fast.

The type is a function of the processor and never timed: the same run has the same bits on a busy
machine.
"""

import platform
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from nibble.kernels.target import device_type

_CPU_INFO = Path("/proc/cpuinfo")


def product_dtype(x: Tensor) -> torch.dtype:
    """The type that `x` and what it is multiplied by should be converted to."""
    is_narrow = x.dtype == torch.bfloat16 and device_type(x) == "cpu"
    return cpu_product_dtype() if is_narrow else x.dtype


@cache
def cpu_product_dtype() -> torch.dtype:
    """bfloat16 where this CPU multiplies it faster than float32.

    Matrix units do, and the vectors of AMD's processors (GFLOP/s of a core, bfloat16 and float32:
    EPYC 200 and 90); those of Intel's do not (Xeon without matrix units 84 and 174).
    """
    has_fast_vectors = torch.cpu._is_avx512_bf16_supported() and not _is_of_intel()
    return torch.bfloat16 if has_matrix_units() or has_fast_vectors else torch.float32


@cache
def has_matrix_units() -> bool:
    """Whether this CPU multiplies bfloat16 so fast that sums in float32 vectors fall behind."""
    return torch.cpu._is_amx_tile_supported()


def _is_of_intel() -> bool:
    try:
        return "GenuineIntel" in _CPU_INFO.read_text(encoding="utf-8")
    except OSError:
        return "GenuineIntel" in platform.processor()
