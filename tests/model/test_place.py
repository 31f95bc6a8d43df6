"""Where a loaded weight goes."""

import pytest
import torch
from transformers import GPT2Config

from nibble.errors import ModelError
from nibble.kernels.nf4 import quantize
from nibble.model.experts import Experts
from nibble.model.linear4bit import DenseLinear, Linear4bit
from nibble.model.place import Placer, Storage
from nibble.model.skeleton import build_config, build_skeleton

QUANT = {"type": "nf4", "block_size": 64, "double": True, "search": False}
IN_4_BITS = Storage(torch.bfloat16, quant=QUANT)
IN_16_BITS = Storage(torch.bfloat16)
CPU = torch.device("cpu")
MIXTRAL = {
    "model_type": "mixtral", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 1, "num_attention_heads": 4, "num_local_experts": 3,
}  # fmt: skip
QUERY = "model.layers.0.self_attn.q_proj.weight"
EXPERTS = "model.layers.0.mlp.experts"


def skeleton():
    return build_skeleton(build_config(MIXTRAL), torch.bfloat16)


def placed(storage):
    model = skeleton()
    placer = Placer(model, storage, CPU)
    torch.manual_seed(0)
    values = {name: torch.randn(t.shape) for name, t in model.state_dict().items()}
    for name, value in values.items():
        placer.place(name, value)
    placer.finish()
    return model, values


def test_in_4_bits():
    model, values = placed(IN_4_BITS)
    assert isinstance(model.get_submodule(QUERY.removesuffix(".weight")), Linear4bit)
    experts = model.get_submodule(EXPERTS)
    assert isinstance(experts, Experts)
    stored = experts.gate_up_proj.quantized
    assert torch.equal(stored.codes, quantize(values[f"{EXPERTS}.gate_up_proj"]).codes)
    assert model.model.layers[0].mlp.gate.weight.dtype == torch.bfloat16
    assert model.lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("storage", [IN_4_BITS, IN_16_BITS], ids=["4 bits", "16 bits"])
def test_experts_one_by_one_equal_the_whole_tensor(storage):
    model, values = placed(storage)
    placer = Placer(skeleton(), storage, CPU)
    for name in (f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj"):
        placer.place_parts(name, [lambda e=e: e[None] for e in values[name]])
    for part in ("gate_up_proj", "down_proj"):
        whole, made = (m.get_submodule(f"{EXPERTS}.{part}") for m in (model, placer.model))
        pairs = zip(whole.parameters(), made.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    with pytest.raises(ModelError, match=r"has shape \(4, 32, 48\), expected \(3, 32, 48\)"):
        placer.place_parts(f"{EXPERTS}.down_proj", [lambda: torch.ones(1, 32, 48)] * 4)


def test_in_16_bits():
    model, values = placed(IN_16_BITS)
    assert isinstance(model.get_submodule(QUERY.removesuffix(".weight")), DenseLinear)
    weight = model.get_submodule(EXPERTS).down_proj.weight
    assert torch.equal(weight, values[f"{EXPERTS}.down_proj"].bfloat16())


def test_trainable():
    model, values = placed(Storage(torch.float32, is_trainable=True))
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad
        assert torch.equal(parameter, values[name])


def test_the_weight_of_conv1d_is_turned():
    config = GPT2Config(n_layer=1, n_embd=64, n_head=4, vocab_size=32, n_positions=16)
    model = build_skeleton(config, torch.bfloat16)
    placer = Placer(model, IN_4_BITS, CPU)
    weight = torch.randn(64, 192)
    placer.place("transformer.h.0.attn.c_attn.weight", weight)
    layer = model.transformer.h[0].attn.c_attn
    assert (layer.in_features, layer.out_features) == (64, 192)
    assert torch.equal(layer.codes, quantize(weight.T).codes)


def test_only_what_stays_needs_memory_of_its_own():
    placer = Placer(skeleton(), IN_4_BITS, CPU)
    assert not placer.needs_copy(QUERY)
    assert not placer.needs_copy(f"{EXPERTS}.down_proj")
    assert placer.needs_copy("model.layers.0.mlp.gate.weight")
    assert placer.needs_copy("lm_head.weight")
    assert placer.needs_copy("model.norm.weight")
    assert Placer(skeleton(), IN_16_BITS, CPU).needs_copy(QUERY)


def test_wrong_weights():
    placer = Placer(skeleton(), IN_4_BITS, CPU)
    with pytest.raises(ModelError, match="has shape"):
        placer.place(QUERY, torch.ones(32, 31))
    with pytest.raises(ModelError, match="stored as int64"):
        placer.place(QUERY, torch.ones(32, 32, dtype=torch.int64))
    with pytest.raises(ModelError, match="NaN"):
        placer.place(QUERY, torch.full((32, 32), torch.nan))
    with pytest.raises(ModelError, match="no weight of a linear layer"):
        placer.place_quantized("model.norm.weight", quantize(torch.ones(4, 8)))
    with pytest.raises(ModelError, match=r"has shape \(4, 8\)"):
        placer.place_quantized(QUERY, quantize(torch.ones(4, 8)))


def test_nothing_may_be_left_out():
    placer = Placer(skeleton(), IN_16_BITS, CPU)
    placer.place("model.norm.weight", torch.ones(32))
    with pytest.raises(ModelError, match="the checkpoint lacks"):
        placer.finish()
