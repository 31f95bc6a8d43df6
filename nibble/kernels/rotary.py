"""Rotary position embedding of queries and keys.

    y = x cos + h(x) sin,  h(x) = (-x2, x1) of the halves x = (x1, x2)

Source:
    Su et al. 2021, arXiv:2104.09864, section 3.4.2; halves as in GPT-NeoX and Llama.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nibble.kernels.library import Library, library_for
from nibble.kernels.target import device_type


def rotary(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys, as transformers' function of the same signature does.

    Differentiable once, with respect to queries and keys; keeps nothing but cos and sin.

    Shapes:
        query, key: (N, H, T, K). cos, sin: (N or 1, T, R) with R <= K: what is behind the first R
        values of a head stays as it is.
    """
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    if not torch.is_grad_enabled():
        return _rotated(query, cos, sin), _rotated(key, cos, sin)
    rotated: Any = _Rotary.apply(query, cos, sin), _Rotary.apply(key, cos, sin)
    return rotated


def rotary_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same by autograd for one tensor, with cos and sin (N or 1, 1, T, R)."""
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    turned = turned * cos + _half_turn(turned) * sin
    return torch.cat([turned, rest], -1) if rest.shape[-1] else turned


class _Rotary(torch.autograd.Function):
    """Turning back is turning with the sines of where each value came from, negated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        cos, sin = ctx.saved_tensors
        (grad_y,) = grads
        library = _library(grad_y, cos, sin)
        if library is None:
            return _turned_back(grad_y, cos, sin), None, None
        # Token by token: the product that comes next reads rows.
        grad_x = torch.empty_like(grad_y.transpose(1, 2), memory_format=torch.contiguous_format)
        grad_x = grad_x.transpose(1, 2)
        library.rotate(grad_y[0], cos[0, 0], sin[0, 0], grad_x[0], back=True)
        return grad_x, None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    library = _library(x, cos, sin)
    if library is None:
        return rotary_reference(x, cos, sin)
    # Products of heads on a CPU read them one after the other, attention on a GPU as they lie.
    is_cpu = device_type(x) == "cpu"
    layout = torch.contiguous_format if is_cpu else torch.preserve_format
    y = torch.empty_like(x, memory_format=layout)
    library.rotate(x[0], cos[0, 0], sin[0, 0], y[0], back=False)
    return y


def _half_turn(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def _turned_back(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned, rest = grad[..., : cos.shape[-1]], grad[..., cos.shape[-1] :]
    turned = turned * cos - _half_turn(turned * sin)
    return torch.cat([turned, rest], -1) if rest.shape[-1] else turned


def _library(x: Tensor, cos: Tensor, sin: Tensor) -> Library | None:
    """The fast code for one row of tokens whose heads are dense."""
    is_dense = x.stride(-1) == 1 and cos.is_contiguous() and sin.is_contiguous()
    is_one_row = len(x) == len(cos) == cos.shape[1] == 1
    return library_for(x, cos, sin) if is_dense and is_one_row else None
