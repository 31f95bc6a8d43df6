"""Models without weights."""

import pytest
import torch
from torch import nn

from nibble.errors import ModelError
from nibble.model.skeleton import build_config, build_skeleton, parameters_on_meta

LLAMA = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip


def test_parameters_are_on_meta_and_buffers_are_computed():
    model = build_skeleton(build_config(LLAMA), torch.bfloat16)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in model.parameters())
    assert not any(b.is_meta for b in model.buffers())
    assert model.model.rotary_emb.inv_freq[0] == 1


def test_modules_made_afterwards_are_real_again():
    with pytest.raises(ZeroDivisionError), parameters_on_meta():
        raise ZeroDivisionError
    assert not nn.Linear(2, 2).weight.is_meta


def test_storage_of_the_checkpoint_does_not_reach_the_config():
    config = build_config(
        LLAMA | {"quantization_config": {"quant_method": "bitsandbytes"}, "torch_dtype": "float16"}
    )
    assert getattr(config, "quantization_config", None) is None
    assert build_skeleton(config, torch.float32).dtype == torch.float32


@pytest.mark.parametrize(
    ("values", "fragment"),
    [
        ({"model_type": "lama"}, "tested with Llama"),
        ({"model_type": "bert-like"}, "unknown architecture"),
        ({"model_type": "llama\nimport os"}, "unknown architecture"),
        ({"model_type": "gemma3", "vision_config": {}}, "not a text-only model"),
        (
            {"model_type": "falcon", "hidden_size": 64, "num_hidden_layers": 2, "alibi": True},
            "ALiBi",
        ),
        ({"model_type": "llama", "num_hidden_layers": 2}, "lacks hidden_size"),
        ({"model_type": "llama"}, "lacks hidden_size, num_hidden_layers"),
        (LLAMA | {"hidden_size": 10**12}, "expected 1 to 10,000,000"),
        (LLAMA | {"vocab_size": -1}, "vocab_size: -1, expected 1"),
        (LLAMA | {"hidden_size": "wide"}, "does not fit 'llama'"),
        (LLAMA | {"hidden_act": "none-such"}, "cannot be built"),
    ],
)
def test_what_is_no_model(values, fragment):
    with pytest.raises(ModelError, match=fragment):
        build_skeleton(build_config(values), torch.float32)
