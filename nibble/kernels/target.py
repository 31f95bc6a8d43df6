"""Which device the code runs for, and which memory an allocation belongs to.

Every choice of an implementation asks `device_type`, so that the planner can run the code of a
CUDA device on tensors without memory. Every allocation that a CUDA run makes in host memory goes
through `host_empty`, so that the planner can tell it from device memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_planned: ContextVar[str | None] = ContextVar("planned device type", default=None)
_on_host: ContextVar[bool] = ContextVar("allocating on the host", default=False)


def device_type(of: Tensor | torch.device) -> str:
    """Where the tensor lives, "cpu" or "cuda", or the device that is planned for."""
    device = of.device if isinstance(of, Tensor) else of
    return _planned.get() or device.type


@contextmanager
def planned_device(type: str) -> Iterator[None]:
    """Within the block, code chooses what it would choose on a device of this type."""
    token = _planned.set(type)
    try:
        yield
    finally:
        _planned.reset(token)


def host_empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """Memory of the host; page-locked where a CUDA device is to copy from and to it."""
    token = _on_host.set(True)
    try:
        is_pinned = torch.cuda.is_available() and _planned.get() is None
        return torch.empty(shape, dtype=dtype, pin_memory=is_pinned)
    finally:
        _on_host.reset(token)


def is_host_allocation() -> bool:
    """Whether an allocation made now is one of `host_empty`."""
    return _on_host.get()
