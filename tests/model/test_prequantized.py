"""Checkpoints that transformers and bitsandbytes stored in 4 bits."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from nibble.errors import ModelError, UsageError
from nibble.model.families import head_of
from nibble.model.ledger import resident_bytes
from nibble.model.linear4bit import Linear4bit
from nibble.model.load import load_base
from nibble.model.prequantized import check_quantization, split_quantized
from nibble.model.tensors import read_entries

WEIGHTS = "model.safetensors"
KINDS = {
    "nf4 double": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "nf4": {"bnb_4bit_quant_type": "nf4"},
    "fp4": {"bnb_4bit_quant_type": "fp4"},
    "fp4 double, bf16 storage": {
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_quant_storage": torch.bfloat16,
    },
}


@pytest.fixture(scope="module")
def stored(tiny_model_folder, tmp_path_factory):
    """Folder and model of bitsandbytes, per kind."""
    made = {}

    def store(kind):
        if kind not in made:
            config = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, **KINDS[kind]
            )
            model = AutoModelForCausalLM.from_pretrained(
                tiny_model_folder("qwen2"), dtype=torch.bfloat16, quantization_config=config
            )
            folder = tmp_path_factory.mktemp("stored")
            model.save_pretrained(folder)
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(tiny_model_folder("qwen2") / name, folder)
            made[kind] = folder, model
        return made[kind]

    return store


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_codes_and_scales_stay_bit_for_bit(stored, kind, search):
    folder, theirs = stored(kind)
    model, _ = load_base(str(folder), storage="nf4", quant={"search": search})
    on_disk = load_file(folder / WEIGHTS)
    count = 0
    for name, layer in model.named_modules():
        if not isinstance(layer, Linear4bit):
            continue
        count += 1
        assert layer.quantized.type == kind[:3]
        codes = on_disk[f"{name}.weight"].view(torch.uint8).flatten()
        assert torch.equal(layer.codes, codes)
        assert torch.equal(layer.absmax, on_disk[f"{name}.weight.absmax"])
        if "double" in kind:
            assert torch.equal(layer.nested_absmax, on_disk[f"{name}.weight.nested_absmax"])
            state = theirs.get_submodule(name).weight.quant_state
            assert layer.offset.item() == state.offset.item()
        bias = on_disk.get(f"{name}.bias")
        assert (layer.bias is None) == (bias is None)
        assert bias is None or torch.equal(layer.bias, bias)
    assert count == 14
    assert not [kind for kind in resident_bytes(model) if kind.endswith("linears")]


@pytest.mark.parametrize("kind", KINDS)
def test_the_dense_weight_is_that_of_bitsandbytes(stored, kind):
    import bitsandbytes

    folder, theirs = stored(kind)
    model, _ = load_base(str(folder), storage="fp4")
    for name, layer in model.named_modules():
        if isinstance(layer, Linear4bit) and layer.in_features % 64 == 0:
            weight = theirs.get_submodule(name).weight
            expected = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
            assert torch.equal(layer.dense_weight(torch.bfloat16), expected)
    assert head_of(model).weight.dtype == torch.bfloat16


@pytest.mark.parametrize("storage", ["bf16", "float32"])
def test_asked_for_in_16_bits_it_is_refused(stored, storage):
    with pytest.raises(UsageError, match="stored in 4 bits"):
        load_base(str(stored("nf4")[0]), storage=storage)


def test_what_bitsandbytes_left_in_16_bits_is_quantised(tiny_model_folder, tmp_path):
    folder = shutil.copytree(tiny_model_folder("mixtral"), tmp_path / "mixtral")
    config = json.loads((folder / "config.json").read_text())
    section = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config["quantization_config"] = section | {"llm_int8_skip_modules": ["lm_head", "k_proj"]}
    (folder / "config.json").write_text(json.dumps(config))
    model, _ = load_base(str(folder), storage="nf4")
    layer = model.model.layers[0]
    assert layer.mlp.experts.gate_up_proj.quantized is not None
    assert isinstance(layer.self_attn.q_proj, Linear4bit)
    assert layer.self_attn.k_proj.weight.dtype == torch.bfloat16
    assert "bfloat16 experts" not in resident_bytes(model)


NAME = "model.layers.0.mlp.up_proj.weight"
STATE = f"{NAME}.quant_state.bitsandbytes__nf4"


def _state(**values):
    def change(tensors):
        state = json.loads(bytes(tensors[STATE].tolist())) | values
        tensors[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return change


def _replace(key, change):
    def apply(tensors):
        tensors[key] = change(tensors[key]).contiguous()

    return apply


DAMAGES = {
    "absmax is missing": (lambda t: t.pop(f"{NAME}.absmax"), "broken or incomplete"),
    "absmax is short": (_replace(f"{NAME}.absmax", lambda t: t[:-1]), "absmax of a 4-bit weight"),
    "codes are short": (_replace(NAME, lambda t: t[:-1]), "codes of a 4-bit weight"),
    "other values": (_replace(f"{NAME}.quant_map", lambda t: t * 2), "other values in quant_map"),
    "unknown type": (_state(quant_type="int4"), "the type is unknown"),
    "other blocks of blocks": (_state(nested_blocksize=128), "blocks of 256"),
    "other shape": (_state(shape=[32, 192]), "has shape (32, 192), expected (96, 64)"),
    "NaN": (_replace(f"{NAME}.nested_absmax", lambda t: t * torch.nan), "not finite"),
    "state is no JSON": (
        _replace(STATE, lambda t: t[:-1]),
        "broken or incomplete",
    ),
    "state is missing": (lambda t: t.pop(STATE), "does not have"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_parts(stored, case, tmp_path):
    damage, fragment = DAMAGES[case]
    folder = shutil.copytree(stored("nf4 double")[0], tmp_path / "model")
    tensors = load_file(folder / WEIGHTS)
    damage(tensors)
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(ModelError) as raised:
        load_base(str(folder), storage="nf4")
    assert fragment in raised.value.what
    assert raised.value.fix


def test_split_keeps_the_weight_among_the_entries(stored):
    entries = read_entries(stored("nf4 double")[0] / WEIGHTS)
    rest, parts = split_quantized(entries)
    assert len(parts) == 14
    assert NAME in rest
    assert set(parts[NAME]) == {
        "state", "absmax", "quant_map", "nested_absmax", "nested_quant_map"
    }  # fmt: skip
    assert not [name for name in rest if "absmax" in name]


def test_check_quantization():
    assert not check_quantization({})
    section = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    assert check_quantization({"quantization_config": section})
    with pytest.raises(ModelError, match="'fp8'"):
        check_quantization({"quantization_config": {"quant_method": "fp8"}})
