"""Log-probabilities of tokens: log softmax of the raw logits, in float32."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenLogprob:
    """A token, its text and its log-probability.

    Args:
        text: What the token adds to a text.
        top: The likeliest tokens in this place, likeliest first: id, text, log-probability.
    """

    token: int
    text: str
    logprob: float
    top: tuple[tuple[int, str, float], ...]


class Logprobs:
    """Makes log-probabilities; remembers the texts of tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}

    def of(self, logits: Tensor, tokens: Sequence[int], num_top: int) -> list[TokenLogprob]:
        """For each row of raw logits (T, V) and its token."""
        values = logits.float().log_softmax(-1)
        own = (
            values.gather(1, values.new_tensor(tokens, dtype=torch.long).unsqueeze(1))
            .flatten()
            .tolist()
        )
        top_values, top_ids = values.topk(min(num_top, values.shape[1]))
        rows = zip(tokens, own, top_ids.tolist(), top_values.tolist(), strict=True)
        return [
            TokenLogprob(token, self._text(token), value, self._top(ids, top))
            for token, value, ids, top in rows
        ]

    def _top(
        self, ids: Sequence[int], values: Sequence[float]
    ) -> tuple[tuple[int, str, float], ...]:
        return tuple(
            (token, self._text(token), value) for token, value in zip(ids, values, strict=True)
        )

    def _text(self, token: int) -> str:
        if token not in self._texts:
            # Some tokenizers leave out the space before the first token of a text.
            once, twice = (self._tokenizer.decode([token] * count) for count in (1, 2))
            self._texts[token] = twice[len(once) :] if twice.startswith(once) else once
        return self._texts[token]
