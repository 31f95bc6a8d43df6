"""Attention of new tokens to the keys and values that their sequences keep.

sequence     kept        new      a new token sees
0            k k k k     k        all five
1            k k         k        all three
"""

import ctypes
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nibble.kernels.layers_cpu import Kept, library_for

# Keys can be read so many at once: behind the last there is memory for them.
KEYS_AT_ONCE = 32


def room_for(num_tokens: int) -> int:
    """Places for the keys of so many tokens, with memory behind them."""
    return -(-(num_tokens + KEYS_AT_ONCE - 1) // KEYS_AT_ONCE) * KEYS_AT_ONCE


def attend_and_keep(
    query: Tensor, key: Tensor, value: Tensor, kept: Kept, **options: Any
) -> Tensor | None:
    """`cached_attention` for one new token a sequence, which is kept as well; by compiled code.

    Shapes:
        query: (1, H, T, K). key and value of the new tokens: (1, G, T, K). -> (1, T, H, K).

    Returns:
        None where the compiled code is not for these states; nothing is kept then.
    """
    library = library_for(query, key, value)
    is_dense = all(states.stride(-1) == 1 for states in (query, key, value))
    if library is None or not is_dense or value.shape != key.shape:
        return None
    y = query.new_empty(1, query.shape[2], query.shape[1], query.shape[3])
    library.attend_cached((query, key, value, y), kept, **options)
    return y


def lengths_of(lengths: Sequence[int]) -> Any:
    """Numbers of kept keys, as `Kept` takes them."""
    return (ctypes.c_int64 * len(lengths))(*lengths)


def cached_attention(
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    documents: Sequence[int],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """softmax(cap(scale q k^T), each new token sees itself and what is before it) v.

    The result of a sequence does not depend on the others.

    Shapes:
        query: (1, H, T, K). keys and values of each sequence: (G, L, K), its new tokens at the
        end; H is a multiple of G. -> (1, T, H, K).

    Args:
        documents: Boundaries of the new tokens of each sequence, from 0 to T.
        window: A token sees so many tokens at most, itself among them.
    """
    outputs = []
    for (start, stop), k, v in zip(pairwise(documents), keys, values, strict=True):
        outputs.append(_attend(query[:, :, start:stop], k[None], v[None], scale, window, softcap))
    return torch.cat(outputs, 2).transpose(1, 2)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    num_new, num_keys = q.shape[2], k.shape[2]
    if window is not None and num_keys > window + num_new - 1:
        first = num_keys - window - num_new + 1
        return _attend(q, k[:, :, first:], v[:, :, first:], scale, window, softcap)
    seen = torch.ones(num_new, num_keys, dtype=torch.bool, device=q.device)
    seen = seen.tril(num_keys - num_new)
    if window is not None:
        seen = seen.triu(num_keys - num_new - window + 1)
    if softcap is None:
        mask = None if num_new == 1 else seen
        is_grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=scale, enable_gqa=is_grouped
        )
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scores = torch.tanh(q @ k.mT * scale / softcap) * softcap
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v
