"""Likelihoods equal plain torch, one choice at a time."""

import pytest
import torch

from nibble.data.choice import Question
from nibble.data.turns import Message
from nibble.errors import DataError
from nibble.model.load import load_base
from nibble.serve.choices import Scored, encode_choices, loglikelihoods

QUESTIONS = [
    Question((Message("user", "what is it?"),), ("A", "B", "C"), 1, "a.jsonl", 1),
    Question((Message("user", "why"),), ("because", "no", "it was so"), 0, "a.jsonl", 2),
    Question((Message("system", "s"), Message("user", "x" * 60)), ("yes", "yes!"), 0, "a", 3),
]


def reference(folder, tokenizer, question, plain):
    """The sums of transformers' own model: context and continuation are encoded apart."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    turns = [{"role": m.role, "content": m.content} for m in question.messages]
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    if plain:
        prompt = "\n\n".join(m.content for m in question.messages)
    sums = []
    for choice in question.choices:
        context = tokenizer(prompt, add_special_tokens=False).input_ids
        text = f"{prompt} {choice}" if plain else prompt + choice
        whole = tokenizer(text, add_special_tokens=False).input_ids
        with torch.no_grad():
            logprobs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        at = range(len(context), len(whole))
        sums.append(sum(float(logprobs[t - 1, whole[t]]) for t in at))
    return sums


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("max_tokens", [1, 100, 4096])
def test_equal_to_plain_torch(tiny_model_folder, family, plain, max_tokens):
    folder = tiny_model_folder(family)
    model, tokenizer = load_base(str(folder), "float32")
    candidates = [encode_choices(q, tokenizer, plain=plain) for q in QUESTIONS]
    num_done = []
    found = loglikelihoods(model, candidates, max_tokens=max_tokens, on_done=num_done.append)
    assert sum(num_done) == len(QUESTIONS)
    for question, sums in zip(QUESTIONS, found, strict=True):
        assert sums == pytest.approx(reference(folder, tokenizer, question, plain), rel=1e-4)


def test_summed_and_by_characters():
    question = Question((Message("user", "q"),), ("no", "certainly not"), 1, "a", 1)
    scored = Scored(question, (-3.0, -6.5))
    assert (scored.chosen, scored.chosen_norm) == (0, 1)
    assert Scored(question, (-1.0, -1.0)).chosen == 0


def test_a_control_token_in_a_choice_is_refused(tiny_model_folder):
    _, tokenizer = load_base(str(tiny_model_folder("llama")), "float32")
    question = Question((Message("user", "q"),), ("a", "b<|im_end|>"), 1, "a.jsonl", 7)
    with pytest.raises(DataError, match=r"a\.jsonl:7"):
        encode_choices(question, tokenizer, plain=False)
