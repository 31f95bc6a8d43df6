"""Frozen linear layers: dense, or stored in 4 bits.

Both offer `in_features`, `out_features`, `forward(x)` and `dense_weight()`, and both compute
`y = x W^T + bias` by the same call: a stored weight gives the same bits as its dense copy.
Nothing here knows of low-rank updates or of layer names.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from nibble.kernels.adapted import frozen_gradient, frozen_product
from nibble.kernels.few_rows import few_rows_product, is_few
from nibble.kernels.few_rows_cpu import StoredWeight
from nibble.kernels.nf4 import BLOCK_SIZE, Quantized, dequantize, quantize
from nibble.kernels.products import product_dtype

_SCRATCH: dict[tuple[torch.device, torch.dtype], Tensor] = {}


class HasDenseWeight(Protocol):
    """A layer that can give its weight as a matrix."""

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """The weight (O, I) in `dtype`."""
        ...


class DenseLinear(nn.Module):
    """A frozen linear layer whose weight is stored as it is.

        y = x W^T + bias

    Shapes:
        x: (..., I) -> y: (..., O). weight: as the given layer keeps it, (O, I), or (I, O) for
        transformers' Conv1D. bias: (O,) or None.

    Args:
        linear: An nn.Linear (or a subclass, such as Falcon's) or a transformers Conv1D; its
            parameters are shared, under the same names, and frozen.
    """

    def __init__(self, linear: nn.Linear | Conv1D) -> None:
        super().__init__()
        self.is_transposed = isinstance(linear, Conv1D)
        shape = linear.weight.shape
        self.in_features, self.out_features = shape if self.is_transposed else shape[::-1]
        self.weight = linear.weight.requires_grad_(False)
        bias: nn.Parameter | None = linear.bias
        self.bias = None if bias is None else bias.requires_grad_(False)

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight (O, I), without a copy if it has this dtype already."""
        weight = self.weight.t() if self.is_transposed else self.weight
        return weight if dtype is None else weight.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        if is_few(x):
            return few_rows_product(x, self.dense_weight(), self.bias)
        return _frozen_linear(x, self, self.bias)

    def extra_repr(self) -> str:
        """Sizes and dtype, for print(model)."""
        return f"{self.in_features}, {self.out_features}, {self.weight.dtype}"


class Linear4bit(nn.Module):
    """A frozen linear layer stored in 4 bits.

        y = x W^T + bias,  W = code * absmax, made anew for every product

    The dense weight exists only in one scratch buffer per device and dtype, which all layers
    share; backward makes it again, and nothing is saved for it.

    Shapes:
        x: (..., I) -> y: (..., O). codes: (ceil(O * I / 2),) uint8. absmax: (N,).
        nested_absmax: (ceil(N / 256),) and offset: (1,), or None. bias: (O,) or None.

    Args:
        q: The stored weight, of shape (O, I).
        bias: Kept in its own dtype.

    Raises:
        ValueError: If the stored weight has other than two dimensions.

    >>> layer = Linear4bit.from_dense(torch.randn(8, 64))
    >>> layer(torch.ones(2, 64)).shape, layer.codes.dtype
    (torch.Size([2, 8]), torch.uint8)
    """

    def __init__(self, q: Quantized, bias: Tensor | None = None) -> None:
        super().__init__()
        if len(q.shape) != 2:
            raise ValueError(f"a linear layer's weight has 2 dimensions, not {len(q.shape)}")
        self.out_features, self.in_features = q.shape
        self.quant_type, self.block_size = q.type, q.block_size
        self.codes = nn.Parameter(q.codes, requires_grad=False)
        self.absmax = nn.Parameter(q.absmax, requires_grad=False)
        self.nested_absmax = _frozen(q.nested_absmax)
        self.offset = _frozen(q.offset)
        self.bias = _frozen(bias)
        self._stored: StoredWeight | None = None

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
        """Quantise a weight (O, I); the arguments are those of `quantize`."""
        q = quantize(weight, type=type, block_size=block_size, double=double, search=search)
        return cls(q, bias)

    @property
    def quantized(self) -> Quantized:
        """The stored weight; its tensors are this layer's parameters."""
        return Quantized(
            self.codes,
            self.absmax,
            self.nested_absmax,
            self.offset,
            (self.out_features, self.in_features),
            self.quant_type,
            self.block_size,
        )

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight (O, I), bfloat16 unless asked otherwise.

        Valid until the next call, of any layer, on this device and in this dtype.
        """
        dtype = torch.bfloat16 if dtype is None else dtype
        out = scratch(self.codes.device, dtype, self.out_features * self.in_features)
        return dequantize(self.quantized, dtype=dtype, out=out)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        if is_few(x):
            return few_rows_product(x, self._stored_weight(), self.bias)
        return _frozen_linear(x, self, self.bias)

    def _stored_weight(self) -> StoredWeight:
        """The weight as products of few rows take it, made anew when it was moved."""
        if self._stored is None or not self._stored.is_of(self.codes):
            self._stored = StoredWeight(self.quantized)
        return self._stored

    def extra_repr(self) -> str:
        """Sizes and storage, for print(model)."""
        return f"{self.in_features}, {self.out_features}, {self.quant_type}"


class _FrozenLinear(torch.autograd.Function):
    """x W^T + bias with a gradient for x alone; saves no tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: HasDenseWeight, bias: Tensor | None) -> Tensor:
        ctx.layer = layer
        weight = weight_for_product(layer, x)
        bias = None if bias is None else bias.to(weight.dtype)
        return frozen_product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor, None, None]:
        (grad_y,) = grads
        return frozen_gradient(grad_y, weight_for_product(ctx.layer, grad_y)), None, None


def _frozen_linear(x: Tensor, layer: HasDenseWeight, bias: Tensor | None) -> Tensor:
    y: Any = _FrozenLinear.apply(x, layer, bias)
    return y


def weight_for_product(layer: HasDenseWeight, x: Tensor) -> Tensor:
    """The dense weight, rounded to the type of `x`, in the type in which both are multiplied.

    Valid until the next call, of any layer, on this device and in this dtype.
    """
    weight, dtype = layer.dense_weight(x.dtype), product_dtype(x)
    if weight.dtype == dtype:
        return weight
    return scratch(weight.device, dtype, weight.numel()).view(weight.shape).copy_(weight)


def _frozen(tensor: Tensor | None) -> nn.Parameter | None:
    return None if tensor is None else nn.Parameter(tensor, requires_grad=False)


@contextmanager
def fresh_scratch() -> Iterator[dict[tuple[torch.device, torch.dtype], Tensor]]:
    """Within the block dense weights are written to new buffers, which are given here."""
    kept = dict(_SCRATCH)
    _SCRATCH.clear()
    try:
        yield _SCRATCH
    finally:
        _SCRATCH.clear()
        _SCRATCH.update(kept)


def scratch(device: torch.device, dtype: torch.dtype, count: int) -> Tensor:
    """The first `count` values of the one buffer of this device and dtype; it never shrinks."""
    key = (device, dtype)
    buffer = _SCRATCH.get(key)
    if buffer is None or buffer.numel() < count:
        # The smaller buffer goes first, so that the two never exist together.
        buffer = None
        _SCRATCH.pop(key, None)
        buffer = _SCRATCH[key] = torch.empty(count, dtype=dtype, device=device)
    return buffer[:count]
