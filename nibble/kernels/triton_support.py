"""Triton kernels for CUDA devices: imported when first needed, checked, then launched.

Before its first use on a device a kernel must agree with its reference. Without Triton, or on any
disagreement, the reference is used and one warning says so.

Set NIBBLE_NO_COMPILE=1 to use the references in any case.
"""

import importlib
import logging
import os
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

_logger = logging.getLogger("nibble")


def is_wanted() -> bool:
    """Whether the user lets anything be compiled."""
    return os.environ.get("NIBBLE_NO_COMPILE") != "1"


def is_right(agrees: Callable[[torch.device], bool], device: torch.device, *, what: str) -> bool:
    """Whether kernels can be built for a device and give there what their references give.

    Args:
        agrees: Compares them on this device.
        what: What goes by the references otherwise, in plural, for the warning.
    """
    if not is_wanted() or device.type != "cuda" or not torch.cuda.is_available():
        return False
    try:
        with _disable_current_modes():  # the check needs values, also where a plan has none
            is_same = agrees(device)
    # Whatever the import, the compiler or the driver raise: the references do without them.
    except Exception as error:
        reason = f"Triton kernels do not work on {device} ({_first_line(error)})"
    else:
        reason = "" if is_same else f"Triton kernels do not agree with it on {device}; report this"
    if reason:
        _logger.warning("%s use the slow torch reference: %s", what, reason)
    return not reason


def launch(
    name: str, grid: tuple[int, ...], device: torch.device, *arguments: Any, **options: Any
) -> None:
    """Run a kernel of `triton_kernels` on the current stream of a device.

    Args:
        grid: Numbers of programs; none runs if one of them is 0.
        arguments: As the kernel has them; tensors stand for pointers to their values.
        options: Values of `tl.constexpr` parameters, and `num_warps`.
    """
    kernel = getattr(_kernels(), name)
    is_interpreted = device.type == "cpu"
    if all(grid):
        with nullcontext() if is_interpreted else torch.cuda.device(device):
            kernel[grid](*arguments, **options, enable_fp_fusion=False)


def as_weight(*pointers: torch.Tensor | None) -> Any:
    """The parts of a stored weight as kernels take them, `triton_kernels.Weight`."""
    return _kernels().Weight(*pointers)


@cache
def _kernels() -> Any:
    return importlib.import_module("nibble.kernels.triton_kernels")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
