"""Held-out loss is weighted by tokens."""

import math

import pytest
import torch

from nibble.data.chat import Example
from nibble.data.loader import eval_batches
from nibble.data.packing import pack
from nibble.model.load import load_base
from nibble.train.evaluate import evaluate


def test_batches_do_not_matter(tiny_model_folder):
    model, _ = load_base(str(tiny_model_folder("llama")), "float32")
    examples = [
        Example(ids, [-100, *ids[1:]], "", 0)
        for ids in ([5, 6, 7], list(range(10, 60)), [9, 8], list(range(40, 90, 2)))
    ]
    rows = pack(examples, max_seq_len=64, packing=False)
    whole = evaluate(model, eval_batches(rows, max_tokens=1000))
    parts = evaluate(model, eval_batches(rows, max_tokens=1))
    assert whole.loss == pytest.approx(parts.loss, rel=1e-6)
    assert whole.num_target_tokens == parts.num_target_tokens == 2 + 49 + 1 + 24
    assert whole.perplexity == pytest.approx(math.exp(whole.loss))
    assert 0 <= whole.token_accuracy <= 1


def test_accuracy_counts_exact_predictions(tiny_model_folder):
    model, _ = load_base(str(tiny_model_folder("llama")), "float32")
    with torch.no_grad():
        predicted = int(model(torch.tensor([[5, 6]])).logits[0, 1].argmax())
    rows = pack([Example([5, 6, predicted], [-100, -100, predicted], "", 0)], max_seq_len=8)
    assert evaluate(model, eval_batches(rows, max_tokens=8)).token_accuracy == 1.0
