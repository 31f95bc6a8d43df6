"""Keys and values that a sequence keeps from token to token, without padding.

    row of new tokens     a b b b c         documents = (0, 1, 4, 5)
    kept before           a: 7  b: 0  c: 2

A prompt is many new tokens of a sequence that keeps nothing yet; a decode step is one new token of
each of several sequences. Both are one packed row through the same layers.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from nibble.kernels.cached_attention import cached_attention
from nibble.model.families import decoder_of


class KeyValues:
    """The keys and values of one sequence in every layer.

    Attributes:
        capacity: Tokens that there is room for.
        length: Tokens that are kept.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.length = capacity, 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the (G, T, K) of new tokens; gives those of all tokens, (G, length + T, K)."""
        if layer not in self._layers:
            self._layers[layer] = (self._empty_like(key), self._empty_like(value))
        stop = self.length + key.shape[1]
        kept_key, kept_value = self._layers[layer]
        kept_key[:, self.length : stop] = key
        kept_value[:, self.length : stop] = value
        return kept_key[:, :stop], kept_value[:, :stop]

    def _empty_like(self, states: Tensor) -> Tensor:
        return states.new_empty(len(states), self.capacity, states.shape[-1])


class CachedDocuments(tuple[int, ...]):
    """Boundaries of the new tokens of sequences in a packed row, and what the sequences keep."""

    sequences: Sequence[KeyValues]

    def __new__(cls, sequences: Sequence[KeyValues], num_new: Sequence[int]) -> "CachedDocuments":
        documents = super().__new__(cls, accumulate(num_new, initial=0))
        documents.sequences = sequences
        return documents

    @property
    def is_fresh(self) -> bool:
        """Whether no sequence keeps anything yet, so that new tokens see new tokens alone."""
        return not any(sequence.length for sequence in self.sequences)

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Keep the states (1, G, T, K) of the new tokens; gives those of all, by sequence."""
        keys, values = [], []
        for sequence, (start, stop) in zip(self.sequences, pairwise(self), strict=True):
            states = key[0, :, start:stop], value[0, :, start:stop]
            all_keys, all_values = sequence.append(layer, *states)
            keys.append(all_keys)
            values.append(all_values)
        return keys, values

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, **options: Any
    ) -> Tensor:
        """Keep the new tokens and attend to all; as `cached_attention`."""
        keys, values = self.append(layer, key, value)
        return cached_attention(query, keys, values, self, **options)


def cached_states(
    model: Any, sequences: Sequence[KeyValues], new_ids: Sequence[Sequence[int]], device: Any
) -> Tensor:
    """The last hidden state of every new token after the final norm, (T, D).

    Args:
        sequences: What each sequence keeps; its new tokens are added.
        new_ids: The new tokens of each sequence, one at least.
    """
    documents = CachedDocuments(sequences, [len(ids) for ids in new_ids])
    ids = [token for tokens in new_ids for token in tokens]
    positions = [
        position
        for sequence, tokens in zip(sequences, new_ids, strict=True)
        for position in range(sequence.length, sequence.length + len(tokens))
    ]
    both = torch.tensor([[ids], [positions]], device=device)
    # Falcon hands its layers the positions alone.
    both_positions: Any = both[1]
    both_positions.nibble_documents = documents
    output = decoder_of(model)(
        input_ids=both[0],
        position_ids=both_positions,
        attention_mask=torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device),
        use_cache=False,
        documents=documents,
    )
    for sequence, tokens in zip(sequences, new_ids, strict=True):
        sequence.length += len(tokens)
    return output[0].squeeze(0)
