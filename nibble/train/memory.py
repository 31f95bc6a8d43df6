"""Peak memory of a run on its device."""

import ctypes
import resource
import sys
from pathlib import Path

import psutil
import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_CONTROL_GROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)
# Up to this share of the free memory the holes of the heap fit beside the tensors.
ROOMY_SHARE = 0.4
# Source: malloc.h of glibc.
_M_MMAP_THRESHOLD = -3
_DENSE_THRESHOLD = 1 << 18
_CPU_MESSAGE = "DefaultCPUAllocator"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a CUDA device or on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _CPU_MESSAGE in str(error)


class PeakMemory:
    """The most memory in use since this object was made.

    On CUDA: bytes allocated by tensors. On the CPU: resident memory of the process above what it
    held at the start, so that Python and the libraries do not count.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        if self._is_cuda:
            torch.cuda.reset_peak_memory_stats(device)
        self._device = device
        self._baseline = 0 if self._is_cuda else psutil.Process().memory_info().rss
        _reset_high_water_mark()

    def bytes(self) -> int:
        """The peak so far, in bytes."""
        if self._is_cuda:
            return torch.cuda.max_memory_allocated(self._device)
        return max(0, _high_water_mark() - self._baseline)


def is_roomy(peak_bytes: int) -> bool:
    """Whether a run needs so little of the free memory that it cannot run short."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return peak_bytes <= ROOMY_SHARE * available_bytes(device)


def keep_heap_dense() -> bool:
    """Give every block of 256 KiB and more back to the system as soon as it is free.

    glibc up to 2.37 keeps holes between aligned blocks: a process may take twice what its tensors
    do. Without the holes a step takes up to a third longer, since every block is made of new
    pages. Returns whether the C library has such a switch.
    """
    try:
        return ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _DENSE_THRESHOLD) == 1
    except (OSError, AttributeError, TypeError):
        return False


def available_bytes(device: torch.device) -> int:
    """Memory that a new run could use on `device`, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(psutil.virtual_memory().available, _control_group_bytes())


def _control_group_bytes() -> int:
    """What the control group of this process, a container's say, leaves free; v2 and v1.

    Pages of files that were read count as used but are given up when memory is short.
    """
    for limit, used in _CONTROL_GROUP_FILES:
        try:
            free = int(Path(limit).read_text()) - int(Path(used).read_text())
        except (OSError, ValueError):  # absent, or "max"
            continue
        return max(0, free + _inactive_file_bytes(Path(used).with_name("memory.stat")))
    return sys.maxsize


def _inactive_file_bytes(stat: Path) -> int:
    try:
        values = dict(line.split() for line in stat.read_text().splitlines())
        return int(values["inactive_file"])
    except (OSError, ValueError, KeyError):
        return 0


def _reset_high_water_mark() -> None:
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return


def _high_water_mark() -> int:
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
