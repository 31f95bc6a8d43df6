"""Greedy answers of trained models over 50 prompts, beside those of transformers."""

import pytest
import torch

from nibble.model.load import load_base
from nibble.serve.batch import Batch
from nibble.serve.sampling import Sampling
from nibble.serve.stops import stop_ids

STARTS = (
    *("Once upon a time", "The little dog", "Lily went to", "def main(", "import os\n"),
    *("What is the capital of", "The doctor said", "In the year", "She looked at", "A big red"),
)
ENDS = ("", " was", " and the", " of", " in a")
NEW_TOKENS = 12
TYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


def _ours(model, tokenizer, prompts):
    batch = Batch(model, tokenizer, max_tokens=1 << 16)
    answers = [batch.add(ids, Sampling(max_new_tokens=NEW_TOKENS)) for ids in prompts]
    tokens = {answer: [] for answer in answers}
    while batch.has_work():
        for piece in batch.step():
            tokens[piece.sequence] += [] if piece.token is None else [piece.token]
    return [tokens[answer] for answer in answers]


def _theirs(model, ids, stops):
    inputs = torch.tensor([ids])
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(inputs)
    output = model.generate(inputs, attention_mask=mask, eos_token_id=sorted(stops), **settings)
    tokens = output[0, len(ids) :].tolist()
    return tokens[:-1] if tokens[-1] in stops else tokens


@pytest.mark.parametrize("storage", TYPES)
@pytest.mark.parametrize("name", ["stories260K", "base-16m"])
def test_greedy_answers_are_those_of_transformers(shared, name, storage):
    from transformers import AutoModelForCausalLM

    folder = shared / "models" / name
    model, tokenizer = load_base(str(folder), storage)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=TYPES[storage])
    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    stops = stop_ids(model, tokenizer)
    prompts = [tokenizer(start + end).input_ids for start in STARTS for end in ENDS]
    assert len(prompts) == 50
    num_same = 0
    for ids, ours in zip(prompts, _ours(model, tokenizer, prompts), strict=True):
        theirs = _theirs(reference, ids, stops)
        num_same += ours == theirs
        if ours == theirs:
            continue
        assert storage == "bf16"
        place = next(n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
        with torch.no_grad():
            logits = exact(torch.tensor([ids + ours[:place]])).logits[0, -1]
        # In bfloat16 sums round otherwise: what differs is a near tie, two steps of the logits.
        step = float(logits.max().abs()) * 2.0**-7
        assert float(logits.max() - logits[ours[place]]) <= 2 * step
        assert float(logits.max() - logits[theirs[place]]) <= 2 * step
    assert num_same >= (50 if storage == "float32" else 30)
