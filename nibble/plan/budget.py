"""What a device offers to tensors, and what a run takes beside them.

tensors + workspace            what torch.cuda.max_memory_allocated shows
+ fragmentation                what torch.cuda.max_memory_reserved shows
+ context                      what nvidia-smi shows
"""

from nibble.plan.devices import MIB, Device
from nibble.plan.tracker import HEAD, SAVED, WORKING, Peak

# CUDA context and loaded kernels, outside of torch's allocator. Source: 0.4 to 0.6 GiB seen with
# torch 2 on compute capability 8 and 9.
CONTEXT_BYTES = 512 * MIB
# cuBLAS: one workspace per handle and stream, 32 MiB from Hopper on, 8.1 MiB before; cublasLt: 1.
# Source: torch aten/src/ATen/cuda/CublasHandlePool.cpp and CUDABlas.cpp.
HOPPER_WORKSPACE_BYTES = 33 * MIB
EARLIER_WORKSPACE_BYTES = 10 * MIB
# Holes between tensors that come and go, as a share of those. Source: an assumption for
# expandable segments, not measured yet.
FRAGMENTATION_SHARE = 0.05
# oneDNN: scratch of products and the code of 2 x 64 shapes. Source: benchmarks/plan_process.py.
CPU_SCRATCH_BYTES = 64 * MIB

_TRANSIENT = (SAVED, WORKING, HEAD)


def budget_bytes(device: Device) -> int:
    """Bytes that one device has for a run."""
    return max(0, device.memory_bytes - (CONTEXT_BYTES if device.type == "cuda" else 0))


def workspace_bytes(device: Device) -> int:
    """Bytes that libraries keep beside the tensors of a run."""
    if device.type == "cpu":
        return CPU_SCRATCH_BYTES
    # Unknown cards are taken to be of the newest kind.
    is_early = device.capability and float(device.capability) < 9
    return EARLIER_WORKSPACE_BYTES if is_early else HOPPER_WORKSPACE_BYTES


def margin_bytes(peak: Peak) -> int:
    """Bytes to leave free for holes between tensors."""
    transient = sum(peak.parts.get(part, 0) for part in _TRANSIENT)
    return int(FRAGMENTATION_SHARE * transient)
