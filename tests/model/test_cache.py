"""What sequences keep gives the states of the whole sequence, however it was cut."""

from types import SimpleNamespace

import pytest
import torch

from nibble.model.cache import CachedDocuments, KeyValues, cached_states
from nibble.model.families import hidden_states
from nibble.model.load import load_base

CPU = torch.device("cpu")


def _whole(model, ids):
    count = len(ids)
    row = SimpleNamespace(
        input_ids=torch.tensor([ids]),
        position_ids=torch.arange(count)[None],
        cu_seq_lens=torch.tensor([0, count]),
    )
    return hidden_states(model, row)


@pytest.mark.parametrize("family", ["llama", "mistral", "falcon-40b", "gemma2", "phi3"])
@torch.no_grad()
def test_states_are_those_of_the_whole_sequence(tiny_model_folder, family):
    model, _ = load_base(str(tiny_model_folder(family)), "float32")
    first, second = list(range(5, 20)), list(range(40, 48))
    caches = [KeyValues(len(first)), KeyValues(len(second))]
    # Both prompts in one row, then pieces of unequal length, then one token each.
    found = ([], [])
    at = [0, 0]
    for num_new in ((9, 3), (4, 1), (1, 3), (1, 1)):
        documents = CachedDocuments(caches, num_new)
        parts = [ids[a : a + n] for ids, a, n in zip((first, second), at, num_new, strict=True)]
        states = cached_states(model, documents, [*parts[0], *parts[1]], CPU)
        for kept, part in zip(found, states.split(num_new), strict=True):
            kept.append(part)
        at = [a + n for a, n in zip(at, num_new, strict=True)]
    for ids, kept in zip((first, second), found, strict=True):
        torch.testing.assert_close(torch.cat(kept), _whole(model, ids), rtol=1e-4, atol=1e-5)
    assert [cache.length for cache in caches] == [len(first), len(second)]


@torch.no_grad()
def test_documents_serve_step_after_step(tiny_model_folder):
    model, _ = load_base(str(tiny_model_folder("llama")), "bf16")
    ids = list(range(5, 15))
    cache = KeyValues(len(ids))
    cached_states(model, CachedDocuments([cache], [4]), ids[:4], CPU)
    documents = CachedDocuments([cache], [1])
    rest = torch.cat([cached_states(model, documents, [token], CPU) for token in ids[4:]])
    torch.testing.assert_close(rest, _whole(model, ids)[4:], rtol=0.1, atol=0.1)
    assert cache.length == len(ids)
