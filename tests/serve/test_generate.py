"""Greedy text equals transformers'."""

import pytest
import torch

from nibble.model.load import load_base
from nibble.serve.generate import generate

FAMILIES = ("llama", "mistral", "falcon-7b", "qwen3", "gemma2", "gemma3", "phi3", "mixtral")


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers(tiny_model_folder, family):
    from transformers import AutoModelForCausalLM

    folder = tiny_model_folder(family)
    model, tokenizer = load_base(str(folder), "float32")
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([tokenizer("hello there")["input_ids"]])
    expected = reference.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    text = tokenizer.decode(expected, skip_special_tokens=True)
    assert generate(model, tokenizer, "hello there", max_new_tokens=12) == text


def test_seed_repeats_the_draw_and_streams_the_text(tiny_model_folder):
    model, tokenizer = load_base(str(tiny_model_folder("llama")), "float32")
    messages = [{"role": "user", "content": "hi"}]
    settings = {"max_new_tokens": 8, "temperature": 1.0, "top_p": 0.9, "seed": 3}
    parts: list[str] = []
    first = generate(model, tokenizer, messages, on_text=parts.append, **settings)
    assert generate(model, tokenizer, messages, **settings) == first
    assert first.startswith("".join(parts))


def test_the_answer_ends_where_the_context_does(tiny_model_folder):
    from nibble.errors import UsageError

    model, tokenizer = load_base(str(tiny_model_folder("llama")), "float32")
    model.generation_config.eos_token_id = None
    text = generate(model, tokenizer, "a" * 250, max_new_tokens=100)
    assert 0 < len(text) <= 6
    with pytest.raises(UsageError, match="256"):
        generate(model, tokenizer, "a" * 257)


def test_a_stop_text_is_no_part_of_the_answer(tiny_model_folder):
    model, tokenizer = load_base(str(tiny_model_folder("llama")), "float32")
    whole = generate(model, tokenizer, "hello there", max_new_tokens=12)
    found = generate(model, tokenizer, "hello there", max_new_tokens=12, stop=[whole[3:5]])
    assert found == whole[: whole.index(whole[3:5])]
