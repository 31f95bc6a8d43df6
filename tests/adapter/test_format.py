"""The adapter folder: PEFT agrees, and nothing broken gets in."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from nibble.adapter.config import CONFIG_FILE
from nibble.adapter.format import WEIGHTS_FILE, read_adapter, read_base_options, write_adapter
from nibble.errors import AdapterError, UsageError
from nibble.model.adapt import adapt
from nibble.model.load import load_base
from nibble.model.lora import LoRALinear

peft = pytest.importorskip("peft")
FAMILIES = ("llama", "mistral", "falcon-7b", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3")
IDS = torch.arange(6, 30)[None]


def _adapted(folder, storage="float32"):
    model, tokenizer = load_base(str(folder), storage)
    adapt(model, rank=3, alpha=5, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.lora_B.data.normal_(std=0.2, generator=generator)
    return model, tokenizer


def _peft_logits(folder, adapter):
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(base, adapter).eval()(IDS).logits


@pytest.fixture
def adapter_folder(tiny_model_folder, tmp_path):
    folder = tiny_model_folder("llama")
    model, tokenizer = _adapted(folder)
    write_adapter(model, tmp_path / "adapter", tokenizer=tokenizer)
    return tmp_path / "adapter"


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_opens_it_and_agrees(tiny_model_folder, tmp_path, family):
    folder = tiny_model_folder(family)
    model, _ = _adapted(folder)
    write_adapter(model, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(
            model(IDS).logits, _peft_logits(folder, tmp_path), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("name", ["stories260K", "babyllama-105", "base-16m"])
def test_peft_agrees_on_real_models(shared, tmp_path, name):
    folder = shared / "models" / name
    model, tokenizer = _adapted(folder)
    write_adapter(model, tmp_path, tokenizer=tokenizer)
    with torch.no_grad():
        ours, theirs = model(IDS).logits, _peft_logits(folder, tmp_path)
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_adapter_of_peft_opens_here(tiny_model_folder, tmp_path):
    folder = tiny_model_folder("llama")
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, use_rslora=True
    )
    made = peft.get_peft_model(base, config).eval()
    made.save_pretrained(tmp_path)
    model, _ = load_base(str(folder), "float32")
    read_adapter(model, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, made(IDS).logits, rtol=1e-5, atol=1e-5)


def test_round_trip_is_exact(tiny_model_folder, adapter_folder):
    model, _ = load_base(str(tiny_model_folder("llama")), "nf4")
    read_adapter(model, adapter_folder)
    again = write_adapter(model, adapter_folder.parent / "again")
    first, second = (load_file(f / WEIGHTS_FILE) for f in (adapter_folder, again))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_files_and_tree(adapter_folder):
    assert {path.name for path in adapter_folder.iterdir()} >= {
        "README.md",
        CONFIG_FILE,
        WEIGHTS_FILE,
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config = json.loads((adapter_folder / CONFIG_FILE).read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 3, 5)
    assert config["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )


def test_model_without_adapter(tiny_model_folder, tmp_path):
    model, _ = load_base(str(tiny_model_folder("llama")), "float32")
    with pytest.raises(UsageError, match="carries no adapter"):
        write_adapter(model, tmp_path)


def _edit_config(folder, **values):
    path = folder / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def _edit_tensors(folder, edit):
    tensors = load_file(folder / WEIGHTS_FILE)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)


BROKEN = {
    "no config": (lambda f: (f / CONFIG_FILE).unlink(), "holds no adapter_config.json"),
    "no weights": (lambda f: (f / WEIGHTS_FILE).unlink(), "holds no adapter_model.safetensors"),
    "bad json": (lambda f: (f / CONFIG_FILE).write_text("{"), "not valid JSON"),
    "other kind": (lambda f: _edit_config(f, peft_type="IA3"), "expected 'LORA'"),
    "dora": (lambda f: _edit_config(f, use_dora=True), "use_dora = True is not supported"),
    "bias": (lambda f: _edit_config(f, bias="all"), "bias = 'all' is not supported"),
    "rank pattern": (lambda f: _edit_config(f, rank_pattern={"q": 2}), "rank_pattern"),
    "rank": (lambda f: _edit_config(f, r=7), "has shape"),
    "rank text": (lambda f: _edit_config(f, r="x"), "r is 'x', expected r from 1"),
    "cut": (lambda f: (f / WEIGHTS_FILE).write_bytes(b"x" * 20), "broken"),
    "nan": (
        lambda f: _edit_tensors(f, lambda t: t[min(t)].fill_(float("nan"))),
        "not finite",
    ),
    "missing": (lambda f: _edit_tensors(f, lambda t: t.pop(min(t))), "lacks"),
    "foreign": (
        lambda f: _edit_tensors(f, lambda t: t.update({"lm_head.weight": torch.ones(1)})),
        "no LoRA factor",
    ),
    "other base": (
        lambda f: _edit_tensors(
            f,
            lambda t: t.update(
                {"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.ones(3, 64)}
            ),
        ),
        "which the model does not have",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_adapter(tiny_model_folder, adapter_folder, case):
    damage, message = BROKEN[case]
    damage(adapter_folder)
    model, _ = load_base(str(tiny_model_folder("llama")), "float32")
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(AdapterError, match=message) as error:
        read_adapter(model, adapter_folder)
    assert [name for name, _ in model.named_modules()] == before
    assert error.value.exit_code == 65


def test_pickled_adapter_is_not_opened(tiny_model_folder, adapter_folder):
    shutil.move(adapter_folder / WEIGHTS_FILE, adapter_folder / "adapter_model.bin")
    model, _ = load_base(str(tiny_model_folder("llama")), "float32")
    with pytest.raises(AdapterError, match=r"convert adapter_model\.bin"):
        read_adapter(model, adapter_folder)


@pytest.mark.parametrize("storage", ["float32", "bf16", "nf4"])
def test_the_file_says_how_the_base_was_kept(tiny_model_folder, tmp_path, storage):
    model, _ = _adapted(tiny_model_folder("llama"), storage)
    write_adapter(model, tmp_path)
    options = read_base_options(tmp_path)
    assert options["storage"] == storage
    assert options["dtype"] == (torch.float32 if storage == "float32" else torch.bfloat16)
    again, _ = load_base(str(tiny_model_folder("llama")), **options)
    read_adapter(again, tmp_path)
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_an_adapter_of_another_tool_says_nothing(tiny_model_folder, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tiny_model_folder("llama"))
    config = peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    peft.get_peft_model(base, config).save_pretrained(tmp_path)
    assert read_base_options(tmp_path) == {}


@pytest.mark.parametrize("text", ["{", "[]", '{"dtype": "load"}', '{"dtype": "bfloat16"}', "1"])
def test_what_it_says_is_checked(tiny_model_folder, tmp_path, text):
    model, _ = _adapted(tiny_model_folder("llama"))
    write_adapter(model, tmp_path)
    path = tmp_path / WEIGHTS_FILE
    save_file(load_file(path), path, {"format": "pt", "nibble.base": text})
    with pytest.raises(AdapterError, match=r"nibble\.base is broken"):
        read_base_options(tmp_path)
