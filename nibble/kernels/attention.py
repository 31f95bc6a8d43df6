"""Causal attention for training in bfloat16 on a CPU.

Where float32 is multiplied faster, torch's fused attention does it on widened states; nothing wide
is kept. Elsewhere it goes by plain products of blocks:

    rows        256 rows of scores at a time, against the keys up to their end
    matrices    as many (document, head) pairs at once as keep a block in the cache of a core
    backward    scores are computed again; dK and dV are summed in float32 over the blocks

torch's fused attention takes one and a half to three times as long: its blocks are too small for
products in bfloat16. Memory beside inputs and outputs does not grow with the square of the length.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from nibble.kernels.layers_cpu import library_for
from nibble.kernels.products import product_dtype
from nibble.kernels.target import device_type, is_fake, report_kernel

aten: Any = torch.ops.aten
# Rows of scores in a block, over all query heads that share a key head, and values of a block.
# Source: benchmarks/cpu_attention.py.
BLOCK_ROWS = 256
BLOCK_VALUES = 1 << 19


def has_own_attention(query: Tensor) -> bool:
    """Whether `cpu_attention` is for these states."""
    return query.dtype == torch.bfloat16 and device_type(query) == "cpu"


def cpu_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """The faster of the two on this CPU; shapes as in `blocked_attention`."""
    is_wide = product_dtype(query) != query.dtype
    return (wide_attention if is_wide else blocked_attention)(query, key, value, scale)


def wide_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """`blocked_attention` by torch's fused attention in float32."""
    y: Any = _WideAttention.apply(query, key, value, scale)
    return y


def blocked_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T, a token sees itself and what is before it) v.

    Shapes:
        query: (N, H, L, K). key and value: (N, G, L, K), H a multiple of G. -> (N, H, L, K).
    """
    y: Any = _BlockedAttention.apply(query, key, value, scale)
    return y


def blocked_attention_reference(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """The same by torch's own attention."""
    is_grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale, enable_gqa=is_grouped
    )


class _WideAttention(torch.autograd.Function):
    """Keeps states and output in their own type, and the logarithm of each sum."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        wide = _widened(query, key, value)
        y, log_sums = aten._scaled_dot_product_flash_attention_for_cpu(
            *wide, 0.0, True, scale=scale
        )
        y = y.to(query.dtype)
        ctx.save_for_backward(query, key, value, y, log_sums)
        ctx.scale = scale
        return y

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, y, log_sums = ctx.saved_tensors
        wide = _widened(query, key, value)
        grad_q, grad_k, grad_v = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(grads[0].float(), *wide, y.float(), log_sums, 0.0, True), scale=ctx.scale
        )
        # Heads that share a key head lie beside one another.
        grad_k, grad_v = (
            grad.view(len(key), key.shape[1], -1, *key.shape[2:]).sum(2)
            if key.shape[1] != query.shape[1]
            else grad
            for grad in (grad_k, grad_v)
        )
        return grad_q.to(query.dtype), grad_k.to(key.dtype), grad_v.to(value.dtype), None


def _widened(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In float32, keys and values once for each query head."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (
        states.float() if repeats == 1 else states.float().repeat_interleave(repeats, 1)
        for states in (key, value)
    )
    return query.float(), key, value


class _BlockedAttention(torch.autograd.Function):
    """With P the probabilities and dS = P * (dP - sum(P * dP)), dP = dO V^T:

    dQ = scale dS K,  dK = scale dS^T Q,  dV = P^T dO

    The R = H / G query heads of a key head lie below one another, as rows of one product. M counts
    pairs of a document and a key head.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.scale = scale
        q_MRLK, k_MLK, v_MLK = _matrices(query, key, value)
        y = torch.empty_like(q_MRLK)
        blocks = _Blocks(q_MRLK, scale, num_products=2)
        for pairs in blocks.pairs():
            q, k, v = (x[pairs].contiguous() for x in (q_MRLK, k_MLK, v_MLK))
            for rows in blocks.rows():
                p = blocks.probabilities(q[:, :, rows], k[:, : rows.stop])
                y[pairs, :, rows] = torch.bmm(p, v[:, : rows.stop]).view_as(q[:, :, rows])
        return y.view(query.shape)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value = ctx.saved_tensors
        q_MRLK, k_MLK, v_MLK = _matrices(query, key, value)
        g_MRLK = grads[0].reshape(q_MRLK.shape)
        grad_q, grad_k, grad_v = (torch.empty_like(x) for x in (q_MRLK, k_MLK, v_MLK))
        blocks = _Blocks(q_MRLK, ctx.scale, num_products=5)
        for pairs in blocks.pairs():
            q, k, v, g = (x[pairs].contiguous() for x in (q_MRLK, k_MLK, v_MLK, g_MRLK))
            sum_k, sum_v = (torch.zeros_like(k, dtype=torch.float32) for _ in range(2))
            for rows in blocks.rows():
                seen = slice(0, rows.stop)
                q_rows, g_rows = q[:, :, rows], g[:, :, rows].flatten(1, 2)
                p, grad_s = blocks.gradients(q_rows, k[:, seen], g_rows, v[:, seen])
                sum_v[:, seen] += torch.bmm(p.mT, g_rows)
                grad_q[pairs, :, rows] = torch.bmm(grad_s, k[:, seen]).view_as(q_rows)
                sum_k[:, seen] += torch.bmm(grad_s.mT, q_rows.flatten(1, 2))
            grad_k[pairs], grad_v[pairs] = sum_k, sum_v
        return grad_q.view(query.shape), grad_k.view(key.shape), grad_v.view(value.shape), None


class _Blocks:
    """Blocks of scores of all pairs, one after the other, in the same memory.

    On fake tensors only the largest block is gone through, and the work of all is reported.
    """

    def __init__(self, q_MRLK: Tensor, scale: float, *, num_products: int) -> None:
        self._num_pairs, self._repeats, self._length, width = q_MRLK.shape
        self._rows = min(self._length, max(1, BLOCK_ROWS // self._repeats))
        num_values = self._repeats * self._rows * self._length
        self._pairs = min(self._num_pairs, max(torch.get_num_threads(), BLOCK_VALUES // num_values))
        self._scores, self._others = (q_MRLK.new_empty(self._pairs * num_values) for _ in range(2))
        self._mask = q_MRLK.new_full((self._rows, self._rows), -torch.inf).triu_(1)
        self._scale, self._library = scale, library_for(q_MRLK)
        self._is_fake = is_fake(q_MRLK)
        if self._is_fake:
            # Causal: half of all scores.
            flops = num_products * self._num_pairs * self._repeats * self._length**2 * width
            report_kernel("attention", flops, num_products * q_MRLK.nbytes)

    def pairs(self) -> Iterator[slice]:
        """Pairs whose blocks are handled at once."""
        starts = range(0, self._num_pairs, self._pairs)
        for start in starts[:1] if self._is_fake else starts:
            yield slice(start, min(start + self._pairs, self._num_pairs))

    def rows(self) -> Iterator[slice]:
        """Rows of the blocks of a pair."""
        starts = range(0, self._length, self._rows)
        for start in starts[-1:] if self._is_fake else starts:
            yield slice(start, min(start + self._rows, self._length))

    def probabilities(self, q: Tensor, k: Tensor) -> Tensor:
        """softmax of the masked scores of a block, (M, R * rows, keys)."""
        num_rows, num_keys = q.shape[2], k.shape[1]
        scores = torch.bmm(q.flatten(1, 2), k.mT, out=self._block(self._scores, q, k))
        by_head = scores.view(-1, num_rows, num_keys)
        if self._library is not None:
            self._library.attend_(by_head, self._scale)
            return scores
        by_head.mul_(self._scale)[..., -num_rows:].add_(self._mask[:num_rows, :num_rows])
        return aten._softmax.out(scores, -1, False, out=self._block(self._others, q, k))

    def gradients(self, q: Tensor, k: Tensor, grad_y: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The probabilities of a block, and the gradient of q k^T."""
        if self._library is None:
            p = self.probabilities(q, k)
            grad_p = torch.bmm(grad_y, v.mT, out=self._block(self._scores, q, k))
            return p, aten._softmax_backward_data(grad_p, p, -1, p.dtype).mul_(self._scale)
        p = torch.bmm(q.flatten(1, 2), k.mT, out=self._block(self._scores, q, k))
        grad_s = torch.bmm(grad_y, v.mT, out=self._block(self._others, q, k))
        by_head = -1, q.shape[2], k.shape[1]
        self._library.attend_gradient_(p.view(by_head), grad_s.view(by_head), self._scale)
        return p, grad_s

    def _block(self, memory: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """(M, R * rows, keys) in the first values of a flat buffer."""
        shape = len(k), self._repeats * q.shape[2], k.shape[1]
        return memory[: shape[0] * shape[1] * shape[2]].view(shape)


def _matrices(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(N, H, L, K), (N, G, L, K) -> (M, R, L, K), (M, L, K) with M = N * G and R = H / G."""
    length, width = query.shape[2:]
    repeats = query.shape[1] // key.shape[1]
    q = query.reshape(-1, repeats, length, width)
    return q, key.reshape(-1, length, width), value.reshape(-1, length, width)
