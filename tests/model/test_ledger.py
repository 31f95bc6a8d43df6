"""The ledger adds up, and says what is stored how."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from nibble.model.adapt import adapt
from nibble.model.ledger import count_parameters, resident_bytes
from nibble.model.load import load_base


def distinct_bytes(model):
    storages = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("family", ["llama", "gemma", "mixtral", "qwen2", "falcon-7b"])
@pytest.mark.parametrize("storage", ["bf16", "float32", "nf4"])
def test_adds_up_to_every_storage(family, storage, tiny_model_folder):
    model, _ = load_base(str(tiny_model_folder(family)), storage=storage)
    adapt(model, rank=2, alpha=4)
    assert sum(resident_bytes(model).values()) == distinct_bytes(model)


def test_a_whole_ledger(tiny_model_folder):
    """Qwen3-MoE: 2 layers of q 64x64, k and v 32x64, o 64x64, 4 experts of 64x64 and 64x32."""
    model, _ = load_base(str(tiny_model_folder("qwen3_moe")), storage="nf4")
    adapt(model, rank=1, alpha=1, target=["experts"])
    num_linear = 2 * (2 * 64 * 64 + 2 * 32 * 64)
    num_expert = 2 * 4 * (64 * 64 + 64 * 32)
    assert resident_bytes(model) == {
        "bfloat16 embeddings": 2 * 320 * 64,
        "bfloat16 head": 2 * 320 * 64,
        "nf4 codes": (num_linear + num_expert) // 2,
        "8-bit absmax": (num_linear + num_expert) // 64,
        # One value per 256 blocks of 64, and at least one per weight.
        "float32 nested absmax": 4 * 2 * 6,
        "float32 offsets": 4 * 2 * 6,
        "bfloat16 norms": 2 * (2 * (64 + 64 + 16 + 16) + 64),
        "bfloat16 routers": 2 * 2 * 4 * 64,
        "float32 adapters": 4 * 2 * 4 * ((64 + 64) + (32 + 64)),
        "float32 tables": 2 * 4 * 8,
    }


@pytest.mark.parametrize("family", ["llama", "gemma", "mixtral", "qwen3_moe", "qwen2", "phi3"])
@pytest.mark.parametrize("storage", ["bf16", "nf4"])
def test_values_are_counted_as_transformers_counts_them(family, storage, tiny_model_folder):
    folder = tiny_model_folder(family)
    reference = AutoModelForCausalLM.from_pretrained(folder)
    model, _ = load_base(str(folder), storage=storage)
    assert count_parameters(model) == sum(p.numel() for p in reference.parameters())


def test_works_for_any_module():
    layer = nn.Linear(3, 2)
    assert resident_bytes(layer) == {"float32 linears": 24, "float32 biases": 8}
    assert count_parameters(layer) == 8
    assert resident_bytes(nn.Module()) == {}


def test_bits_per_parameter_with_double_quantisation():
    from nibble.model.linear4bit import Linear4bit

    layer = Linear4bit.from_dense(torch.randn(1024, 1024))
    bits = 8 * sum(resident_bytes(layer).values()) / count_parameters(layer)
    assert bits == pytest.approx(4.127, abs=1e-3)
