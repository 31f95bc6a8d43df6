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

from nibble.kernels.cached_attention import (
    attend_and_keep,
    cached_attention,
    lengths_of,
    room_for,
)
from nibble.kernels.layers_cpu import Kept
from nibble.model.families import decoder_of


class KeyValues:
    """The keys and values of one sequence in every layer.

    Shapes:
        keys of a layer: (G, K, room), one key a column, so that scores need no sums across a
        vector. values: (G, room, K).

    Attributes:
        capacity: Tokens that there is room for.
        length: Tokens that are kept.
        layers: Keys and values by layer.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.length = capacity, 0
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the (G, T, K) of new tokens; gives those of all tokens, (G, length + T, K)."""
        if layer not in self.layers:
            room = room_for(self.capacity)
            kept = (
                key.new_empty(len(key), key.shape[-1], room),
                value.new_empty(len(value), room, value.shape[-1]),
            )
            self.layers[layer] = kept
        keys, values = self.layers[layer]
        stop = self.length + key.shape[1]
        keys[:, :, self.length : stop] = key.mT
        values[:, self.length : stop] = value
        return keys[:, :, :stop].mT, values[:, :stop]


class CachedDocuments(tuple[int, ...]):
    """Boundaries of the new tokens of sequences in a packed row, and what the sequences keep.

    Serves as long as the same sequences get as many new tokens.

    Args:
        sequences: What each keeps; new tokens are added.
        num_new: How many new tokens each gets, 1 at least.
    """

    sequences: Sequence[KeyValues]

    def __new__(cls, sequences: Sequence[KeyValues], num_new: Sequence[int]) -> "CachedDocuments":
        documents = super().__new__(cls, accumulate(num_new, initial=0))
        documents.sequences = tuple(sequences)
        documents._kept = {}
        documents._lengths = lengths_of([0] * len(documents.sequences))
        return documents

    _kept: dict[int, Kept]
    _lengths: Any

    @property
    def is_fresh(self) -> bool:
        """Whether no sequence keeps anything yet, so that new tokens see new tokens alone."""
        return not any(sequence.length for sequence in self.sequences)

    def begin(self) -> list[int]:
        """Get ready for the next new tokens; gives their positions."""
        for number, sequence in enumerate(self.sequences):
            self._lengths[number] = sequence.length
        return [
            sequence.length + place
            for sequence, (start, stop) in zip(self.sequences, pairwise(self), strict=True)
            for place in range(stop - start)
        ]

    def end(self) -> None:
        """Count the new tokens, once all layers keep them."""
        for sequence, (start, stop) in zip(self.sequences, pairwise(self), strict=True):
            sequence.length += stop - start

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
        if self[-1] == len(self.sequences):
            y = attend_and_keep(query, key, value, self._kept_in(layer), **options)
            if y is not None:
                return y
        keys, values = self.append(layer, key, value)
        return cached_attention(query, keys, values, self, **options)

    def _kept_in(self, layer: int) -> Kept:
        if layer not in self._kept:
            layers = [sequence.layers[layer] for sequence in self.sequences]
            keys, values = zip(*layers, strict=True)
            self._kept[layer] = Kept(keys, values, self._lengths)
        return self._kept[layer]


def cached_states(
    model: Any, documents: CachedDocuments, ids: Sequence[int], device: torch.device
) -> Tensor:
    """The last hidden state of every new token after the final norm, (T, D).

    Args:
        ids: The new tokens of all sequences, one sequence after the other.
    """
    both = torch.tensor([[ids], [documents.begin()]], device=device)
    # Falcon hands its layers the positions alone.
    positions: Any = both[1]
    positions.nibble_documents = documents
    output = decoder_of(model)(
        input_ids=both[0],
        position_ids=positions,
        attention_mask=torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device),
        use_cache=False,
        documents=documents,
    )
    documents.end()
    return output[0].squeeze(0)
