"""Causal attention inside the documents of a packed row, in bfloat16 on a CPU.

Scores and their gradients are float32, as in torch's. Compiled code goes through the documents.
Where the CPU has matrix units, and where there are fewer documents and heads than threads, plain
products of blocks do, of probabilities in the type that the CPU multiplies fastest:

    rows        256 rows of scores at a time, against the keys up to their end
    heads       as many key heads at once as keep a block in the cache of a core
    backward    scores are computed again; dK and dV are summed in float32 over the blocks

torch's fused attention takes one and a half to three times as long: its blocks are too small.
Memory beside inputs and outputs does not grow with the square of the length.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from nibble.kernels.layers_cpu import Library, library_for
from nibble.kernels.products import has_matrix_units, product_dtype
from nibble.kernels.target import device_type, is_fake, report_kernel

aten: Any = torch.ops.aten
# Rows of scores in a block, over all query heads that share a key head, and bytes of a block.
# Source: benchmarks/cpu_attention.py.
BLOCK_ROWS = 256
BLOCK_BYTES = 1 << 20
_SCORE_BYTES = 4


def has_own_attention(query: Tensor) -> bool:
    """Whether `blocked_attention` is for these states."""
    return query.dtype == torch.bfloat16 and device_type(query) == "cpu"


def blocked_attention(
    query: Tensor, key: Tensor, value: Tensor, documents: Sequence[int], scale: float
) -> Tensor:
    """softmax(scale q k^T, a token sees itself and what is before it in its document) v.

    Shapes:
        query: (1, H, T, K). key and value: (1, G, T, K), H a multiple of G. -> (1, T, H, K).

    Args:
        documents: Boundaries from 0 to T.
    """
    with torch.autocast("cpu", enabled=False):  # the types of the products are chosen here
        y: Any = _BlockedAttention.apply(query, key, value, documents, scale)
    return y


def blocked_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, documents: Sequence[int], scale: float
) -> Tensor:
    """The same by torch's own attention, document by document."""
    is_grouped = query.shape[1] != key.shape[1]
    outputs = []
    for start, stop in pairwise(documents):
        q, k, v = (states[:, :, start:stop] for states in (query, key, value))
        outputs.append(
            F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scale, enable_gqa=is_grouped
            )
        )
    return torch.cat(outputs, 2).transpose(1, 2)


class _BlockedAttention(torch.autograd.Function):
    """With P the probabilities and dS = P * (dP - sum(P * dP)), dP = dO V^T:

    dQ = scale dS K,  dK = scale dS^T Q,  dV = P^T dO

    The R = H / G query heads of a key head lie below one another, as rows of one product.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, documents: Sequence[int], scale: float
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.documents, ctx.scale = documents, scale
        q_GRTK, k_GTK, v_GTK = _by_key_head(query, key), key[0], value[0]
        y = query.new_empty(1, query.shape[2], query.shape[1], query.shape[3])
        library = _library_of_documents(query, key, value, documents, num_products=2)
        if library is not None:
            states = query, key, value, y.transpose(1, 2)
            library.attend_documents(states, documents, scale)
            return y
        y_GRTK = _by_key_head(y.transpose(1, 2), key)
        blocks = _Blocks(q_GRTK, documents, scale, num_products=2)
        for document, heads in blocks.parts():
            q, y_part = (states[heads, :, document] for states in (q_GRTK, y_GRTK))
            k, v = (states[heads, document] for states in (k_GTK, v_GTK))
            _attend(blocks, q, k, v, y_part)
        return y

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value = ctx.saved_tensors
        grad_y = grads[0].contiguous().transpose(1, 2)
        # Token by token: the products that come next read rows.
        grad_q, grad_k, grad_v = (
            torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format)
            for x in (query, key, value)
        )
        grad_q, grad_k, grad_v = (grad.transpose(1, 2) for grad in (grad_q, grad_k, grad_v))
        library = _library_of_documents(query, key, value, ctx.documents, num_products=5)
        if library is not None:
            states = query, key, value, grad_y, grad_q, grad_k, grad_v
            library.attend_documents(states, ctx.documents, ctx.scale)
            return grad_q, grad_k, grad_v, None, None
        q_GRTK, k_GTK, v_GTK = _by_key_head(query, key), key[0], value[0]
        g_GRTK, grad_q_GRTK = (_by_key_head(grad, key) for grad in (grad_y, grad_q))
        blocks = _Blocks(q_GRTK, ctx.documents, ctx.scale, num_products=5)
        for document, heads in blocks.parts():
            states_GRTK = q_GRTK, g_GRTK, grad_q_GRTK
            states_GTK = k_GTK, v_GTK, grad_k[0], grad_v[0]
            q, g, grad_q_part = (states[heads, :, document] for states in states_GRTK)
            k, v, grad_k_part, grad_v_part = (states[heads, document] for states in states_GTK)
            _differentiate(blocks, (q, k, v, g), (grad_q_part, grad_k_part, grad_v_part))
        return grad_q, grad_k, grad_v, None, None


def _attend(blocks: "_Blocks", q: Tensor, k: Tensor, v: Tensor, y: Tensor) -> None:
    """Write the result of some key heads in a document; what it took is free afterwards."""
    q, k, v = (blocks.dense(states) for states in (q, k, v))
    for rows in blocks.rows(k.shape[1]):
        p = blocks.probabilities(q[:, :, rows], k[:, : rows.stop])
        y[:, :, rows] = torch.bmm(p, v[:, : rows.stop]).view_as(q[:, :, rows])
        del p  # the next one takes its place


def _differentiate(
    blocks: "_Blocks", states: tuple[Tensor, ...], gradients: tuple[Tensor, ...]
) -> None:
    """Write the gradients of q, k, v, given these and that of the result, of some key heads."""
    q, k, v, g = (blocks.dense(each) for each in states)
    grad_q, grad_k, grad_v = gradients
    sum_k, sum_v = (torch.zeros_like(k, dtype=torch.float32) for _ in range(2))
    for rows in blocks.rows(k.shape[1]):
        seen = slice(0, rows.stop)
        q_rows, g_rows = q[:, :, rows], g[:, :, rows].flatten(1, 2)
        p, grad_s = blocks.gradients(q_rows, k[:, seen], g_rows, v[:, seen])
        sum_v[:, seen] += torch.bmm(p.mT, g_rows)
        grad_q[:, :, rows] = torch.bmm(grad_s, k[:, seen]).view_as(q_rows)
        sum_k[:, seen] += torch.bmm(grad_s.mT, q_rows.flatten(1, 2))
        del p, grad_s, g_rows  # the next ones take their place
    grad_k.copy_(sum_k)
    grad_v.copy_(sum_v)


class _Blocks:
    """Blocks of scores of all documents and heads, one after the other, in the same memory.

    On fake tensors only the largest block of each length is gone through, and the work of all is
    reported.
    """

    def __init__(
        self, q_GRTK: Tensor, documents: Sequence[int], scale: float, *, num_products: int
    ) -> None:
        self._num_heads, self._repeats = q_GRTK.shape[:2]
        self._documents = [slice(a, b) for a, b in pairwise(documents) if a < b]
        self._scale, self._library = scale, library_for(q_GRTK)
        self._dtype = product_dtype(q_GRTK)
        self._is_fake = is_fake(q_GRTK)
        lengths = dict.fromkeys(part.stop - part.start for part in self._documents)
        if self._is_fake:
            _report(q_GRTK.flatten(0, 1)[None], documents, num_products)
            self._documents = [slice(0, length) for length in lengths]
        num_values = max(self._heads(n) * self._repeats * self._rows(n) * n for n in lengths)
        wide = torch.promote_types(self._dtype, torch.float32)
        self._scores, self._others = (q_GRTK.new_empty(num_values, dtype=wide) for _ in range(2))

    def parts(self) -> Iterator[tuple[slice, slice]]:
        """Tokens of a document, and key heads that are handled at once."""
        for document in self._documents:
            at_once = self._heads(document.stop - document.start)
            starts = range(0, self._num_heads, at_once)
            for start in starts[:1] if self._is_fake else starts:
                yield document, slice(start, min(start + at_once, self._num_heads))

    def rows(self, length: int) -> Iterator[slice]:
        """Rows of the blocks of a document."""
        at_once = self._rows(length)
        starts = range(0, length, at_once)
        for start in starts[-1:] if self._is_fake else starts:
            yield slice(start, min(start + at_once, length))

    def dense(self, states: Tensor) -> Tensor:
        """A copy, in the type of the products, whose values lie in order."""
        return states.new_empty(states.shape, dtype=self._dtype).copy_(states)

    def probabilities(self, q: Tensor, k: Tensor) -> Tensor:
        """softmax of the masked scores of a block, (G, R * rows, keys)."""
        num_rows, num_keys = q.shape[2], k.shape[1]
        scores = self._product(q.flatten(1, 2), k, self._scores)
        by_head = scores.view(-1, num_rows, num_keys)
        if self._library is not None:
            self._library.attend_(by_head, self._scale)
            return scores.to(self._dtype)
        mask = scores.new_full((num_rows, num_rows), -torch.inf).triu_(1)
        by_head.mul_(self._scale)[..., -num_rows:].add_(mask)
        p = self._others[: scores.numel()].view(scores.shape)
        return aten._softmax.out(scores, -1, False, out=p).to(self._dtype)

    def gradients(self, q: Tensor, k: Tensor, grad_y: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The probabilities of a block, and the gradient of q k^T."""
        if self._library is None:
            p = self.probabilities(q, k)
            grad_p = self._product(grad_y, v, self._scores)
            grad_s = aten._softmax_backward_data(grad_p, p.to(grad_p.dtype), -1, grad_p.dtype)
            return p, grad_s.mul_(self._scale).to(self._dtype)
        p = self._product(q.flatten(1, 2), k, self._scores)
        grad_s = self._product(grad_y, v, self._others)
        by_head = -1, q.shape[2], k.shape[1]
        self._library.attend_gradient_(p.view(by_head), grad_s.view(by_head), self._scale)
        return p.to(self._dtype), grad_s.to(self._dtype)

    def _product(self, rows: Tensor, columns: Tensor, memory: Tensor) -> Tensor:
        """rows columns^T in float32 at least, in the first values of a flat buffer."""
        shape = len(rows), rows.shape[1], columns.shape[1]
        out = memory[: shape[0] * shape[1] * shape[2]].view(shape)
        return torch.bmm(rows.to(out.dtype), columns.mT.to(out.dtype), out=out)

    def _rows(self, length: int) -> int:
        return min(length, max(1, BLOCK_ROWS // self._repeats))

    def _heads(self, length: int) -> int:
        num_bytes = self._repeats * self._rows(length) * length * _SCORE_BYTES
        return min(self._num_heads, max(torch.get_num_threads(), BLOCK_BYTES // num_bytes))


def _library_of_documents(
    query: Tensor, key: Tensor, value: Tensor, documents: Sequence[int], *, num_products: int
) -> Library | None:
    """The compiled code, where it is the faster way; the work on fake tensors is reported."""
    num_parts = (len(documents) - 1) * key.shape[1]
    has_dense_heads = all(states.stride(-1) == 1 for states in (query, key, value))
    if has_matrix_units() or not has_dense_heads or num_parts < torch.get_num_threads():
        return None
    library = library_for(query, key, value)
    if library is not None and is_fake(query):
        _report(query, documents, num_products)
    return library


def _report(query: Tensor, documents: Sequence[int], num_products: int) -> None:
    """Say what attention would do. Causal: half of all scores."""
    flops = num_products * query.shape[1] * query.shape[-1]
    flops *= sum((stop - start) ** 2 for start, stop in pairwise(documents))
    report_kernel("attention", flops, num_products * query.nbytes)


def _by_key_head(states: Tensor, key: Tensor) -> Tensor:
    """A view of (1, H, T, K) with heads that share a key head together: (G, R, T, K)."""
    return states[0].unflatten(0, (key.shape[1], -1))
