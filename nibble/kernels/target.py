"""Which device the code runs for, and which memory an allocation belongs to.

Every choice of an implementation asks `device_type`, so that the planner can run the code of a
CUDA device on fake tensors, which have shapes and no values. Every allocation that a CUDA run
makes in host memory goes through `host_empty`, so that the planner can tell it from device
memory. A kernel that is given fake tensors says what it would do instead of doing it all.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

KernelListener = Callable[[str, int, int, int], None]

_planned: ContextVar[str | None] = ContextVar("planned device type", default=None)
_on_kernel: ContextVar[KernelListener | None] = ContextVar("kernel listener", default=None)
_on_host: ContextVar[bool] = ContextVar("allocating on the host", default=False)


def device_type(of: Tensor | torch.device) -> str:
    """Where the tensor lives, "cpu" or "cuda", or the device that is planned for."""
    device = of.device if isinstance(of, Tensor) else of
    return _planned.get() or device.type


@contextmanager
def planned_device(type: str, *, on_kernel: KernelListener | None = None) -> Iterator[None]:
    """Within the block, code chooses what it would choose on a device of this type.

    Args:
        on_kernel: Receives what `report_kernel` is told.
    """
    tokens = _planned.set(type), _on_kernel.set(on_kernel)
    try:
        yield
    finally:
        _planned.reset(tokens[0])
        _on_kernel.reset(tokens[1])


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor has a shape and no values; parameters and views of such a one have none."""
    return isinstance(tensor, FakeTensor)


def report_kernel(kind: str, flops: int, num_bytes: int, num_parts: int = 1) -> None:
    """Say what a kernel would do, where it was given fake tensors.

    Args:
        kind: "decode" (a stored weight made dense), "attention" or "other".
        flops: Its floating-point operations.
        num_bytes: What it would read and write.
        num_parts: Of how many equal parts of its input it handles one.
    """
    listen = _on_kernel.get()
    if listen is not None:
        listen(kind, flops, num_bytes, num_parts)


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
