"""Choosing layers, freezing the rest, counting."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nibble.errors import UsageError
from nibble.model.adapt import adapt, updates_off
from nibble.model.load import load_base
from nibble.model.lora import LoRALinear


def test_all_linear_but_the_head(tiny_model_folder):
    model, _ = load_base(str(tiny_model_folder("llama")), "float32")
    adapted = adapt(model, rank=2, alpha=4)
    assert len(adapted.names) == 2 * 7
    assert not any("lm_head" in name for name in adapted.names)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"{n}.{f}" for n in adapted.names for f in ("lora_A", "lora_B")}


def test_suffixes(tiny_model_folder):
    model, _ = load_base(str(tiny_model_folder("llama")), "nf4")
    adapted = adapt(model, rank=2, alpha=4, target=["q_proj", "v_proj"])
    assert {name.rpartition(".")[2] for name in adapted.names} == {"q_proj", "v_proj"}


def test_unknown_suffix_names_the_candidates(tiny_model_folder):
    model, _ = load_base(str(tiny_model_folder("llama")), "float32")
    with pytest.raises(UsageError, match=r"q_proj.*\n.*did you mean"):
        adapt(model, rank=2, alpha=4, target=["q_prj"])


def test_twice_is_refused(tiny_model_folder):
    model, _ = load_base(str(tiny_model_folder("llama")), "float32")
    adapt(model, rank=2, alpha=4)
    with pytest.raises(UsageError, match="adapted already"):
        adapt(model, rank=2, alpha=4)


def test_same_seed_same_factors(tiny_model_folder):
    factors = []
    for _ in range(2):
        model, _ = load_base(str(tiny_model_folder("llama")), "float32")
        adapt(model, rank=2, alpha=4, generator=torch.Generator().manual_seed(7))
        factors.append([m.lora_A for m in model.modules() if isinstance(m, LoRALinear)])
    assert all(torch.equal(a, b) for a, b in zip(*factors, strict=True))


def test_llama_2_7b_trains_less_than_one_per_cent():
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
        adapted = adapt(model, rank=16, alpha=32)
    assert adapted.num_trainable == 39_976_960
    assert adapted.num_total == 6_738_415_616 + 39_976_960
    assert adapted.trainable_share == pytest.approx(0.0059, abs=1e-4)


def test_updates_off(tiny_model_folder):
    model, _ = load_base(str(tiny_model_folder("llama")), "float32")
    ids = torch.arange(5, 15)[None]
    base = model(ids).logits
    adapt(model, rank=2, alpha=4)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            torch.nn.init.normal_(module.lora_B)
    assert not torch.allclose(model(ids).logits, base)
    with updates_off(model):
        assert torch.equal(model(ids).logits, base)
