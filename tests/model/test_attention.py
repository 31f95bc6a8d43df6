"""Packed attention against a plain softmax over a mask, and what it refuses."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from nibble.errors import ModelError
from nibble.model import attention
from nibble.model.attention import packed_attention
from nibble.model.load import load_base

MODULE = nn.Module()
DOCUMENTS = (0, 1, 2, 9, 16, 20)


def states(num_tokens=20, heads=4, groups=2, width=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, heads, num_tokens, width), *[(1, groups, num_tokens, width)] * 2)
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


def expected_attention(query, key, value, documents, *, window=None, softcap=None, scale=None):
    """softmax(cap(scale q k^T) + mask) v over the whole row, in float64."""
    query, key, value = (s.double() for s in (query, key, value))
    times = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    scores = query @ key.mT * (scale or query.shape[-1] ** -0.5)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    position = torch.arange(query.shape[2])
    number = torch.bucketize(position, torch.tensor(documents[1:]), right=True)
    visible = (number[:, None] == number) & (position[:, None] >= position)
    if window:
        visible &= position[:, None] - position < window
    return (scores.masked_fill(~visible, -torch.inf).softmax(-1) @ value).transpose(1, 2)


OPTIONS = {
    "plain": {},
    "scaling": {"scaling": 0.7},
    "window": {"sliding_window": 3},
    "window longer than any document": {"sliding_window": 64},
    "soft cap": {"softcap": 1.5},
    "soft cap and window": {"softcap": 1.5, "sliding_window": 3},
}


@pytest.mark.parametrize("block", [4, 512])
@pytest.mark.parametrize("name", OPTIONS)
def test_values_and_gradients(name, block, monkeypatch):
    monkeypatch.setattr(attention, "QUERY_BLOCK", block)
    options = OPTIONS[name]
    inputs = states()
    ours, weights = packed_attention(MODULE, *inputs, None, DOCUMENTS, **options)
    theirs = expected_attention(
        *inputs,
        DOCUMENTS,
        window=options.get("sliding_window"),
        softcap=options.get("softcap"),
        scale=options.get("scaling"),
    )
    assert weights is None
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    direction = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad((ours * direction).sum(), inputs)
    expected = torch.autograd.grad((theirs * direction).sum(), inputs)
    for gradient, reference in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("documents", "runs"),
    [
        ((0, 4), [(0, 4, 4)]),
        ((0, 1, 2, 5, 7), [(0, 2, 1), (2, 5, 3), (5, 7, 2)]),
        ((0, 2, 4, 6), [(0, 6, 2)]),
        ((0, 2, 3, 5), [(0, 2, 2), (2, 3, 1), (3, 5, 2)]),
    ],
)
def test_documents_of_equal_length_are_one_run(documents, runs):
    assert list(attention._runs(documents)) == runs


@pytest.mark.parametrize(
    "options",
    [{"s_aux": torch.ones(4)}, {"attention_bias": 1.0}, {"is_causal": False}],
    ids=["sinks", "unknown", "not causal"],
)
def test_what_cannot_be_honoured_is_refused(options):
    with pytest.raises(ModelError, match="packed rows do not support"):
        packed_attention(MODULE, *states(), None, DOCUMENTS, **options)


def test_boundaries_must_cover_the_row():
    with pytest.raises(ModelError, match="boundaries up to T"):
        packed_attention(MODULE, *states(), None, (0, 5))


def test_lost_boundaries_are_noticed():
    placeholder = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    with pytest.raises(ModelError, match="does not pass document boundaries"):
        packed_attention(MODULE, *states(), placeholder)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_without_documents_it_is_causal_attention(softcap):
    inputs = states()
    module = SimpleNamespace(is_causal=True, num_key_value_groups=2, training=False)
    ours, _ = packed_attention(module, *inputs, None, softcap=softcap)
    theirs = expected_attention(*inputs, (0, 20), softcap=softcap)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3", "falcon-7b", "phi3"])
def test_with_a_cache_as_without(family, tiny_model_folder):
    model, _ = load_base(str(tiny_model_folder(family)), storage="float32")
    ids = torch.arange(10, 22)[None]
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits[0]
        cache = DynamicCache(config=model.config)
        parts = [model(ids[:, :7], past_key_values=cache).logits[0]]
        parts += [
            model(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits[0]
            for i in range(7, 12)
        ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-4)
