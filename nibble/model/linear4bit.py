"""Frozen linear layers: stored in 16 bits (DenseLinear) or in 4 (Linear4bit).

Both offer what an update needs: `in_features`, `out_features`, `bias`, `forward` and
`dense_weight`. A 4-bit weight exists in 16 bits only while a product uses it, in one buffer that
all layers of a device share.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from nibble.kernels.nf4 import BLOCK_SIZE, Quantized, dequantize, quantize

_scratch: dict[tuple[torch.device, torch.dtype], Tensor] = {}


def scratch(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor in the buffer that all dequantised weights share, valid until the next call."""
    numel = torch.Size(shape).numel()
    buffer = _scratch.get((device, dtype))
    if buffer is None or buffer.numel() < numel:
        buffer = _scratch[device, dtype] = torch.empty(numel, dtype=dtype, device=device)
    return buffer[:numel].view(shape)


class DenseLinear(nn.Module):
    """A frozen linear layer whose weight stays as it is.

    Args:
        layer: nn.Linear or a subclass, or transformers' Conv1D, whose weight is transposed.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.is_transposed = isinstance(layer, Conv1D)
        self.weight = nn.Parameter(layer.weight.data, requires_grad=False)
        bias = layer.bias
        self.bias = None if bias is None else nn.Parameter(bias.data, requires_grad=False)

    @property
    def in_features(self) -> int:
        return self.weight.shape[0 if self.is_transposed else 1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[1 if self.is_transposed else 0]

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight, (O, I)."""
        weight = self.weight.T if self.is_transposed else self.weight
        return weight if dtype is None else weight.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        return F.linear(x, self.dense_weight(x.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class Linear4bit(nn.Module):
    """A frozen linear layer stored in 4 bits.

    Codes and scales are one-dimensional frozen parameters, so that a sharded model can hold
    them like any other. Neither pass keeps a 16-bit copy of the weight.

    Shapes:
        x: (..., I) -> (..., O).
    """

    def __init__(self, quantized: Quantized, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = quantized.shape
        self.type, self.block_size = quantized.type, quantized.block_size
        self.codes = _frozen(quantized.codes)
        self.absmax = _frozen(quantized.absmax)
        self.nested_absmax = _frozen(quantized.nested_absmax)
        self.offset = _frozen(quantized.offset)
        self.bias = _frozen(bias)

    @classmethod
    def from_dense(
        cls,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        type: str = "nf4",
        block_size: int = BLOCK_SIZE,
        double: bool = True,
        search: bool = False,
    ) -> "Linear4bit":
        """Quantise an (O, I) weight."""
        settings = {"type": type, "block_size": block_size, "double": double, "search": search}
        return cls(quantize(weight, **settings), bias)

    @property
    def quantized(self) -> Quantized:
        """The stored weight."""
        return Quantized(
            codes=self.codes,
            absmax=self.absmax,
            nested_absmax=self.nested_absmax,
            offset=self.offset,
            shape=(self.out_features, self.in_features),
            type=self.type,
            block_size=self.block_size,
        )

    @torch.no_grad()
    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight in 16 bits, (O, I), valid until the next call on this device."""
        shape = (self.out_features, self.in_features)
        out = scratch(shape, dtype or torch.bfloat16, self.codes.device)
        return dequantize(self.quantized, out=out)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        return _Product4bit.apply(x, self)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.type}"


class _Product4bit(torch.autograd.Function):
    """y = x W^T + b; saves nothing, since W is frozen and can be had again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Linear4bit) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.dense_weight(x.dtype), layer.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        return grads[0] @ ctx.layer.dense_weight(grads[0].dtype), None


def _frozen(tensor: Tensor | None) -> nn.Parameter | None:
    return None if tensor is None else nn.Parameter(tensor, requires_grad=False)
