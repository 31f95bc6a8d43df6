"""The check that guards architectures nobody tested."""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config, GptOssConfig

from nibble.errors import ModelError
from nibble.model import selfcheck
from nibble.model.families import Head
from nibble.model.load import load_base
from nibble.model.selfcheck import check_model


def written(config, tiny_model_folder, folder):
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model_folder("llama") / name, folder)
    return str(folder)


@pytest.mark.parametrize(
    ("family", "storage"),
    [("llama", "float32"), ("gemma2", "float32"), ("falcon-40b", "nf4"), ("qwen3", "bf16")],
)
def test_first_class_families_pass(family, storage, tiny_model_folder):
    model, _ = load_base(str(tiny_model_folder(family)), storage=storage)
    found = check_model(model.train())
    assert max(found.packing, found.head) < (1e-5 if storage == "float32" else 0.03)
    assert model.training


def test_a_leak_is_noticed(tiny_model_folder, monkeypatch):
    model, _ = load_base(str(tiny_model_folder("llama")), storage="float32")
    for layer in model.model.layers:
        forward = layer.self_attn.forward

        def leak(*args, forward=forward, documents=None, **kwargs):
            return forward(*args, documents=documents and (0, documents[-1]), **kwargs)

        monkeypatch.setattr(layer.self_attn, "forward", leak)
    with pytest.raises(ModelError, match="see one another"):
        check_model(model)


def test_another_head_is_noticed(tiny_model_folder, monkeypatch):
    model, _ = load_base(str(tiny_model_folder("gemma2")), storage="float32")
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    monkeypatch.setattr(selfcheck, "head_of", lambda model: Head(model.lm_head.weight))
    with pytest.raises(ModelError, match="logits from hidden states"):
        check_model(model)


def test_an_unlisted_architecture_is_named_and_checked(tiny_model_folder, tmp_path, caplog):
    config = GPT2Config(vocab_size=320, n_embd=64, n_layer=2, n_head=4)
    model, _ = load_base(written(config, tiny_model_folder, tmp_path), storage="nf4")
    assert "gpt2 is not among the tested architectures" in caplog.text
    assert check_model(model).packing < 0.05


@pytest.mark.parametrize(
    ("config", "fragment"),
    [
        (
            GptOssConfig(
                vocab_size=320, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_local_experts=4,
                pad_token_id=2, eos_token_id=1,
            ),
            "s_aux",
        ),
        (BloomConfig(vocab_size=320, hidden_size=64, n_layer=2, n_head=4), "packed documents"),
    ],
    ids=["sinks", "ALiBi"],
)  # fmt: skip
def test_what_cannot_pack_is_refused(config, fragment, tiny_model_folder, tmp_path):
    with pytest.raises(ModelError, match=fragment):
        load_base(written(config, tiny_model_folder, tmp_path))
