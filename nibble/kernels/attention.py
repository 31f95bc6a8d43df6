"""Causal attention for training on short documents in 16 bits on a CPU, by plain products.

torch's fused attention splits every (document, head) into small blocks; up to some hundred
tokens whole matrices are faster, though the probabilities are kept for the backward pass.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from nibble.kernels.target import device_type

# Longest document that gains: measured by benchmarks/short_attention.py.
MOST_TOKENS = 512


def is_short(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `short_attention` is the faster one for these states, (N, H or G, L, K)."""
    states = (query, key, value)
    needs_gradient = torch.is_grad_enabled() and any(state.requires_grad for state in states)
    is_narrow = query.dtype == torch.bfloat16 and device_type(query) == "cpu"
    return needs_gradient and is_narrow and query.shape[2] <= MOST_TOKENS


def short_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T, a token sees itself and what is before it) v.

    Shapes:
        query: (N, H, L, K). key and value: (N, G, L, K), H a multiple of G. -> (N, H, L, K).
    """
    y: Any = _ShortAttention.apply(query, key, value, scale)
    return y


def short_attention_reference(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """The same by torch's own attention."""
    is_grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale, enable_gqa=is_grouped
    )


class _ShortAttention(torch.autograd.Function):
    """With P the probabilities and dS = P * (dP - sum(P * dP)), dP = dO V^T:

    dQ = scale dS K,  dK = scale dS^T Q,  dV = P^T dO

    The H / G query heads that share a key head lie below one another, as rows of one product.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        length, width = query.shape[2:]
        repeats = query.shape[1] // key.shape[1]
        q = query.reshape(-1, repeats * length, width)
        k, v = key.reshape(-1, length, width), value.reshape(-1, length, width)
        mask = torch.full((length, length), -torch.inf, dtype=q.dtype, device=q.device).triu(1)
        p = torch.baddbmm(mask.repeat(repeats, 1), q, k.mT, alpha=scale).softmax(-1)
        ctx.save_for_backward(q, k, v, p)
        ctx.scale, ctx.query_shape, ctx.key_shape = scale, query.shape, key.shape
        return torch.bmm(p, v).view(query.shape)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_y: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, p = ctx.saved_tensors
        grad = grad_y.reshape(q.shape)
        grad_v = torch.bmm(p.mT, grad)
        grad_s = torch.ops.aten._softmax_backward_data(torch.bmm(grad, v.mT), p, -1, p.dtype)
        grad_q = torch.bmm(grad_s, k).mul_(ctx.scale)
        grad_k = torch.bmm(grad_s.mT, q).mul_(ctx.scale)
        shape = ctx.key_shape
        return grad_q.view(ctx.query_shape), grad_k.view(shape), grad_v.view(shape), None
