"""Device operations, one name each; each stands beside a plain torch reference."""

from nibble.kernels.cross_entropy import head_cross_entropy, head_metrics
from nibble.kernels.nf4 import (
    Quantized,
    dequantize,
    dequantize_slice,
    implementation,
    quantize,
)

__all__ = [
    "Quantized",
    "dequantize",
    "dequantize_slice",
    "head_cross_entropy",
    "head_metrics",
    "implementation",
    "quantize",
]
