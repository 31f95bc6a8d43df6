"""Tokens and their texts."""

import torch

from nibble.model.load import load_base
from nibble.serve.logprobs import Logprobs


def test_the_texts_of_tokens_are_the_text(shared):
    """Also where the tokenizer strips the space of a first token."""
    for name in ("stories260K", "base-16m"):
        _, tokenizer = load_base(str(shared / "models" / name), "float32")
        ids = tokenizer("Once upon a time, there was", add_special_tokens=False).input_ids
        logits = torch.zeros(len(ids), len(tokenizer))
        found = Logprobs(tokenizer).of(logits, ids, 0)
        assert "".join(each.text for each in found).lstrip() == "Once upon a time, there was"
