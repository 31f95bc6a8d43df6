"""Which code does the operations of layers: one chooser for all of them.

compiled C      bfloat16 of a CPU                              `layers_cpu`
Triton          floats of a CUDA device                        `layers_triton`
plain torch     everything else, and where those do not work   next to each operation
"""

import torch
from torch import Tensor

from nibble.kernels import layers_cpu, layers_triton, nf4
from nibble.kernels.products import cpu_product_dtype, has_matrix_units

Library = layers_cpu.Library | layers_triton.Library


def library_for(*tensors: Tensor) -> Library | None:
    """The fast code that works on all of these, or None."""
    return layers_cpu.library_for(*tensors) or layers_triton.library_for(*tensors)


def paths(device: torch.device) -> dict[str, str]:
    """What does each kind of operation on a device, for reports."""
    is_cpu = device.type == "cpu"
    library = (layers_cpu.load() if is_cpu else layers_triton.load(device)) is not None
    fast = "compiled C" if is_cpu else "Triton"
    wide = is_cpu and cpu_product_dtype() == torch.float32
    attention = "torch"
    if is_cpu:
        attention = fast if library and not has_matrix_units() else "blocks"
    return {
        "4-bit weights": nf4.implementation(device),
        "norms and units": fast if library else "torch",
        "rotations": fast if library else "torch",
        "head": fast if library else "torch",
        "attention": attention,
        "products": "torch in float32" if wide else "torch in bfloat16",
    }
