"""Which code does the operations of layers: one chooser for all of them.

compiled C      bfloat16 of a CPU                              `layers_cpu`
Triton          floats of a CUDA device                        `layers_triton`
plain torch     everything else, and where those do not work   next to each operation
"""

from torch import Tensor

from nibble.kernels import layers_cpu, layers_triton

Library = layers_cpu.Library | layers_triton.Library


def library_for(*tensors: Tensor) -> Library | None:
    """The fast code that works on all of these, or None."""
    return layers_cpu.library_for(*tensors) or layers_triton.library_for(*tensors)
