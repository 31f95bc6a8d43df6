"""Attention over packed rows: a token sees earlier tokens of its own document and nothing else.

    row        a b c c c d d          documents = (0, 1, 2, 5, 7)
    call 1     [a][b]                 runs of equal length are one call
    call 2     [c c c]
    call 3     [d d]

No mask is built: documents are attended one run after the other, in bfloat16 on a CPU one by one.
Sliding windows and soft caps are honoured; what cannot be honoured is refused. Without `documents`
(generation with a cache) the function behaves as transformers' own SDPA attention.

Registered in transformers under the name "nibble" when this module is imported.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.models.falcon.modeling_falcon import FalconAttention, apply_rotary_pos_emb

from nibble.errors import ModelError
from nibble.kernels.attention import blocked_attention, has_own_attention
from nibble.model.cache import CachedDocuments

NAME = "nibble"
QUERY_BLOCK = 512

# Arguments that name things attention does not depend on once the documents are known.
_HARMLESS = frozenset(
    {
        "position_ids",
        "position_embeddings",
        "cache_position",
        "use_cache",
        "return_dict",
        "output_router_logits",
        "logits_to_keep",
        "num_items_in_batch",
    }
)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    documents: Sequence[int] | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each document, in the form that transformers layers call.

    Shapes:
        query: (1, H, T, K), key and value: (1, groups, T, K) -> (1, T, H, K).

    Args:
        documents: Boundaries from 0 to T, as Python numbers; None attends as SDPA does.
        options: scaling, dropout, sliding_window and softcap; others must be None or harmless.

    Raises:
        ModelError: If an option cannot be honoured or the boundaries were lost on the way.
    """
    if documents is None:
        return _attend_masked(module, query, key, value, attention_mask, options)
    _refuse_unknown(module, query, documents, options)
    options = {
        "scale": options.get("scaling") or query.shape[-1] ** -0.5,
        "dropout": options.get("dropout") or 0.0,
        "window": options.get("sliding_window"),
        "softcap": options.get("softcap"),
    }
    if isinstance(documents, CachedDocuments):
        attended = _attend_cached(module, query, key, value, documents, options)
        if attended is not None:
            return attended, None
    if _is_plain(options, documents) and has_own_attention(query):
        return blocked_attention(query, key, value, documents, options["scale"]), None
    outputs = []
    for start, stop, length in _runs(documents):
        parts = [_split(states, start, stop, length) for states in (query, key, value)]
        outputs.append(_join(_attend(*parts, **options)))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1), None


def use_packed_attention(model: nn.Module) -> None:
    """Patch the attention layers that do not ask transformers' registry (Falcon)."""
    for module in model.modules():
        if type(module) is FalconAttention:
            module.__class__ = PackedFalconAttention


class PackedFalconAttention(FalconAttention):
    """Falcon's attention, with packed rows attended document by document.

    Falcon hands layers no extra arguments, so the boundaries are read off the positions.
    """

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, hidden_states: Tensor, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """(1, T, D) -> (1, T, D); other calls are left to transformers."""
        mask, position_ids = kwargs.get("attention_mask"), kwargs.get("position_ids")
        is_cached = isinstance(getattr(position_ids, "nibble_documents", None), CachedDocuments)
        is_packed = is_cached or _is_placeholder(mask, hidden_states.shape[1])
        if position_ids is None or not is_packed:
            return super().forward(hidden_states, **kwargs)
        query, key, value = (
            states.transpose(1, 2)
            for states in self._split_heads(self.query_key_value(hidden_states))
        )
        query, key = apply_rotary_pos_emb(query, key, *kwargs["position_embeddings"])
        documents = _documents(position_ids)
        output, _ = packed_attention(self, query, key, value, None, documents)
        return self.dense(output.flatten(2)), None


def _attend_cached(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: CachedDocuments,
    options: dict[str, Any],
) -> Tensor | None:
    """Keep the new tokens, and attend to those before them; None where there are none."""
    if documents.is_fresh:
        documents.append(module.layer_idx, key, value)
        return None
    rest = {name: options[name] for name in ("scale", "window", "softcap")}
    return documents.attend(module.layer_idx, query, key, value, **rest)


def _attend_masked(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    options: dict[str, Any],
) -> tuple[Tensor, None]:
    """Attention by mask, as transformers does it, soft cap included."""
    if _is_placeholder(mask, key.shape[2]):
        raise ModelError(
            f"{type(module).__name__} does not pass document boundaries on to its attention",
            fix="use one of the first-class families",
        )
    if options.get("s_aux") is not None:
        raise ModelError(f"{type(module).__name__} uses attention sinks, which are not supported")
    if options.get("softcap") is None:
        output, _ = sdpa_attention_forward(module, query, key, value, mask, **options)
        return output, None
    if mask is None:
        mask = _band(query.shape[2], key.shape[2], options.get("sliding_window"), query.device)
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    output = _explicit(query, key, value, mask, scale, options["softcap"])
    return output.transpose(1, 2).contiguous(), None


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    dropout: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attention inside each of N documents of L tokens: (N, H, L, K) -> (N, H, L, K)."""
    length = query.shape[2]
    is_banded = window is not None and length > window
    if softcap is None and not is_banded:
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            is_causal=True,
            dropout_p=dropout,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    outputs = []
    for start in range(0, length, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, length)
        first = max(0, start - window + 1) if window is not None else 0
        mask = _band(stop - start, stop - first, window, query.device)
        block = (query[:, :, start:stop], key[:, :, first:stop], value[:, :, first:stop])
        if softcap is None:
            block = (block[0], *(_repeat(states, query.shape[1]) for states in block[1:]))
            attended = F.scaled_dot_product_attention(
                *block, attn_mask=mask, dropout_p=dropout, scale=scale
            )
        elif torch.is_grad_enabled() and length > QUERY_BLOCK:
            # The (L, L) scores of a long document are computed again rather than kept.
            attended = checkpoint(_explicit, *block, mask, scale, softcap, use_reentrant=False)
        else:
            attended = _explicit(*block, mask, scale, softcap)
        outputs.append(attended)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)


def _is_plain(options: dict[str, Any], documents: Sequence[int]) -> bool:
    """Whether nothing is dropped or capped and no window is shorter than a document."""
    window = options["window"]
    is_banded = window is not None and max(b - a for a, b in pairwise(documents)) > window
    return not (options["dropout"] or options["softcap"] or is_banded)


def _explicit(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, softcap: float
) -> Tensor:
    """softmax(cap(scale * q k^T) + mask) v, the softmax in float32."""
    key, value = _repeat(key, query.shape[1]), _repeat(value, query.shape[1])
    scores = torch.tanh(query @ key.transpose(2, 3) * scale / softcap) * softcap
    if mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    else:
        scores = scores + mask
    return scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ value


def _runs(documents: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Start, stop and document length of each run of documents of equal length.

    (0, 1, 2, 5, 7) -> (0, 2, 1), (2, 5, 3), (5, 7, 2).
    """
    start, length = 0, documents[1]
    for a, b in pairwise(documents):
        if b - a != length:
            yield start, a, length
            start, length = a, b - a
    yield start, documents[-1], length


def _split(states: Tensor, start: int, stop: int, length: int) -> Tensor:
    """(1, H, T, K) -> the run's N documents as a view, (N, H, L, K)."""
    run = states[0, :, start:stop]
    return run.unflatten(1, (-1, length)).transpose(0, 1)


def _join(states: Tensor) -> Tensor:
    """(N, H, L, K) -> (1, N * L, H, K)."""
    return states.transpose(1, 2).flatten(0, 1).unsqueeze(0)


def _band(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor:
    """True where a query sees a key; the last query stands at the last key.

    A query at position p sees the keys p - window + 1 .. p: 2 queries, 4 keys, window 2 give
    [[0, 1, 1, 0], [0, 0, 1, 1]].
    """
    offset = num_keys - num_queries
    mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(offset)
    return mask if window is None else mask.triu(offset - window + 1)


def _repeat(states: Tensor, num_heads: int) -> Tensor:
    """(N, groups, L, K) -> (N, H, L, K)."""
    times = num_heads // states.shape[1]
    return states if times == 1 else states.repeat_interleave(times, 1)


def _is_placeholder(mask: Any, num_keys: int) -> bool:
    """Whether `mask` is the single element that `hidden_states` passes instead of a mask."""
    return isinstance(mask, Tensor) and mask.shape == (1, 1, 1, 1) and num_keys > 1


def _documents(position_ids: Tensor) -> Sequence[int]:
    """Boundaries of the documents, read off the positions once per batch and kept with them."""
    known = getattr(position_ids, "nibble_documents", None)
    if known is None:
        starts = (position_ids[0] == 0).nonzero().flatten().tolist()
        known = (*starts, position_ids.shape[1])
        position_ids.nibble_documents = known  # type: ignore[attr-defined]
    return known


def _refuse_unknown(
    module: nn.Module, query: Tensor, documents: Sequence[int], options: dict[str, Any]
) -> None:
    """Stop on everything that would change the result in silence."""
    known = {"scaling", "dropout", "sliding_window", "softcap"} | _HARMLESS
    wrong = [name for name, value in options.items() if name not in known and value is not None]
    wrong = [name for name in wrong if not (name == "is_causal" and options[name] is True)]
    wrong = [name for name in wrong if options[name] is not False]
    if not getattr(module, "is_causal", True) or options.get("is_causal") is False:
        wrong.append("is_causal=False")
    if wrong:
        raise ModelError(
            f"{type(module).__name__} asks attention for {', '.join(wrong)}, which packed rows "
            "do not support",
            fix="use one of the first-class families",
        )
    if query.shape[0] != 1 or documents[-1] != query.shape[2]:
        raise ModelError(
            f"packed rows are (1, T) with boundaries up to T; got {tuple(query.shape)} and "
            f"{documents[-1]}"
        )


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
