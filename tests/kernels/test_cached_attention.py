"""Attention to kept keys: that of a whole sequence's last token, whatever the other sequences."""

import pytest
import torch

from nibble.kernels.cached_attention import (
    attend_and_keep,
    cached_attention,
    lengths_of,
    room_for,
)
from nibble.kernels.layers_cpu import Kept, load

LENGTHS = (0, 1, 31, 32, 33, 100)
OPTIONS = [
    {"window": None, "softcap": None},
    {"window": 4, "softcap": None},
    {"window": 32, "softcap": 5.0},
    {"window": None, "softcap": 2.0},
]


def _expected(q, k, v, scale, window, softcap):
    """(H, 1, K) to (G, L, K), in float64."""
    repeats = len(q) // len(k)
    k, v = (states.double().repeat_interleave(repeats, 0) for states in (k, v))
    scores = q.double() @ k.mT * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if window is not None:
        scores[..., : max(0, k.shape[1] - window)] = -torch.inf
    return scores.softmax(-1) @ v


def _states(heads, groups, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    count = len(LENGTHS)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).bfloat16()

    new = [draw(1, number, count, width) for number in (heads, groups, groups)]
    # As a product gives them: heads of a token lie together.
    new = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in new]
    before = [(draw(groups, length, width), draw(groups, length, width)) for length in LENGTHS]
    return new, before


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    ("heads", "groups", "width"), [(4, 2, 16), (6, 2, 64), (7, 1, 80), (8, 8, 128)]
)
def test_compiled_and_reference_are_plain_attention(heads, groups, width, options):
    (query, key, value), before = _states(heads, groups, width)
    keys, values, kept_keys, kept_values = [], [], [], []
    for number, (k, v) in enumerate(before):
        keys.append(torch.cat([k, key[0, :, number : number + 1]], 1))
        values.append(torch.cat([v, value[0, :, number : number + 1]], 1))
        room = room_for(k.shape[1] + 1)
        kept_keys.append(torch.full((groups, width, room), torch.nan).bfloat16())
        kept_values.append(torch.full((groups, room, width), torch.nan).bfloat16())
        kept_keys[-1][:, :, : k.shape[1]], kept_values[-1][:, : k.shape[1]] = k.mT, v
    documents = range(len(LENGTHS) + 1)
    expected = torch.stack(
        [
            _expected(query[0, :, n : n + 1], keys[n], values[n], 0.3, *options.values())[:, 0]
            for n in range(len(LENGTHS))
        ]
    )[None]
    found = cached_attention(query, keys, values, documents, scale=0.3, **options)
    torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=2e-2)
    kept = Kept(kept_keys, kept_values, lengths_of(LENGTHS))
    compiled = attend_and_keep(query, key, value, kept, scale=0.3, **options)
    if load() is None:
        assert compiled is None
        return
    torch.testing.assert_close(compiled.double(), expected, rtol=1e-2, atol=1e-2)
    for number, length in enumerate(LENGTHS):
        assert torch.equal(kept_keys[number][:, :, : length + 1].mT, keys[number])
        assert torch.equal(kept_values[number][:, : length + 1], values[number])
        alone = Kept(kept_keys[number:][:1], kept_values[number:][:1], lengths_of([length]))
        states = (x[:, :, number : number + 1] for x in (query, key, value))
        again = attend_and_keep(*states, alone, scale=0.3, **options)
        assert torch.equal(again, compiled[:, number : number + 1])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_several_new_tokens_see_what_is_before_them(options):
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (
        torch.randn(1, n, 9, 16, generator=generator, dtype=torch.float64) for n in (4, 2, 2)
    )
    found = cached_attention(query[:, :, 5:], [keys[0]], [values[0]], (0, 4), scale=0.5, **options)
    one_by_one = [
        cached_attention(
            query[:, :, n : n + 1], [keys[0, :, : n + 1]], [values[0, :, : n + 1]], (0, 1),
            scale=0.5, **options,
        )
        for n in range(5, 9)
    ]  # fmt: skip
    torch.testing.assert_close(found, torch.cat(one_by_one, 1), rtol=1e-5, atol=1e-6)


def test_states_that_the_compiled_code_does_not_know_are_left():
    states = torch.ones(3, 1, 2, 1, 16)
    kept = Kept([torch.ones(2, 16, 32)], [torch.ones(2, 32, 16)], lengths_of([0]))
    options = {"scale": 1.0, "window": None, "softcap": None}
    assert attend_and_keep(*states, kept, **options) is None
