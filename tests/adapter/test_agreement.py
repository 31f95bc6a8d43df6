"""Losses and divergences of two models, against plain formulas over whole logits."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from nibble.adapter import agreement
from nibble.adapter.agreement import MOST_TOKENS, Predictions, compare, held_out_batches, predict
from nibble.data.packing import Row
from nibble.model.families import Head
from nibble.model.load import load_base


def _row(length, generator):
    ids = torch.randint(5, 261, (length,), generator=generator).numpy()
    labels = ids.copy()
    labels[: length // 2] = -100
    return Row(ids, labels, np.arange(length), np.zeros(length, dtype=np.int64))


@pytest.mark.parametrize("chunk", [1, 7 * 40, 1 << 20])
def test_figures_are_those_of_the_formulas(monkeypatch, chunk):
    monkeypatch.setattr(agreement, "_CHUNK_VALUES", chunk)
    generator = torch.Generator().manual_seed(0)
    head = Head(torch.randn(40, 8, generator=generator))
    hidden = [torch.randn(19, 8, generator=generator) for _ in range(2)]
    labels = torch.randint(40, (19,), generator=generator)
    found = compare(*(Predictions(states, labels, head) for states in hidden))
    p, q = (head.logits(states).log_softmax(-1) for states in hidden)
    kl = F.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    assert found.num_target_tokens == 19
    assert found.loss == pytest.approx(F.nll_loss(q, labels).item(), rel=1e-6)
    assert found.mean_kl == pytest.approx(kl.mean().item(), rel=1e-5)
    assert found.max_kl == pytest.approx(kl.max().item(), rel=1e-5)
    num_same = int((p.argmax(-1) == q.argmax(-1)).sum())
    assert found.top1_agreement == num_same / 19


def test_a_model_agrees_with_itself(tiny_model_folder):
    model, _ = load_base(str(tiny_model_folder("llama")), "float32")
    rows = [_row(n, torch.Generator().manual_seed(n)) for n in (8, 21, 4)]
    batches = held_out_batches(rows)
    found = compare(predict(model, batches), predict(model, batches))
    assert (found.mean_kl, found.max_kl, found.top1_agreement) == (0, 0, 1)
    with torch.no_grad():
        losses = [
            F.cross_entropy(
                model(torch.from_numpy(row.input_ids)[None]).logits[0, :-1],
                torch.from_numpy(row.labels)[1:],
                reduction="sum",
            ).item()
            for row in rows
        ]
    assert found.num_target_tokens == 4 + 11 + 2
    assert found.loss == pytest.approx(sum(losses) / found.num_target_tokens, rel=1e-5)


@pytest.mark.parametrize("length", [24, MOST_TOKENS + 1])
def test_held_out_rows_are_bounded(length):
    rows = [_row(length, torch.Generator().manual_seed(0))] * (2 * MOST_TOKENS // length + 1)
    total = sum(batch.input_ids.numel() for batch in held_out_batches(rows))
    assert total == (length if length > MOST_TOKENS else MOST_TOKENS // 24 * 24)
