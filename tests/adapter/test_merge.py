"""Merged models predict as base and adapter do, or are refused."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nibble.adapter.certificate import CERTIFICATE_FILE
from nibble.adapter.format import read_adapter, write_adapter
from nibble.adapter.merge import Merge, base_options_of, merge
from nibble.data.packing import Row
from nibble.errors import AdapterError, FolderInUseError, UsageError
from nibble.model.adapt import adapt
from nibble.model.experts import Experts
from nibble.model.load import load_base
from nibble.model.lora import LoRALinear

FAMILIES = (
    "llama", "mistral", "falcon-7b", "falcon-40b", "qwen2", "qwen3", "gemma", "gemma2", "gemma3",
    "phi3", "mixtral", "qwen3_moe",
)  # fmt: skip
IDS = torch.arange(6, 30)[None]
FLOAT32 = {"storage": "float32", "dtype": torch.float32, "quant": {}}
BF16 = {"storage": "bf16", "dtype": torch.bfloat16, "quant": {}}
NF4 = {"storage": "nf4", "dtype": torch.bfloat16, "quant": {"block_size": 64, "double": True}}


def _write_adapter(folder, out, options, *, std=0.2, **settings):
    """An adapter of all layers with random factors."""
    model, tokenizer = load_base(str(folder), **options)
    adapt(model, rank=3, alpha=5, generator=torch.Generator().manual_seed(0), **settings)
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        parts = [module] if isinstance(module, LoRALinear) else []
        if isinstance(module, Experts) and module.has_lora:
            parts = [module.gate_up_proj, module.down_proj]
        for part in parts:
            part.lora_B.data.normal_(std=std, generator=generator)
    write_adapter(model, out, tokenizer=tokenizer)
    return Merge(out, str(folder), None, base_options_of(out, {}, {}))


@pytest.fixture
def rows():
    """Held-out rows of the tiny tokenizer: 8 documents of 24 tokens, of which 12 are targets."""
    generator = torch.Generator().manual_seed(2)
    made = []
    for _ in range(8):
        ids = torch.randint(5, 261, (24,), generator=generator).numpy()
        labels = ids.copy()
        labels[:12] = -100
        made.append(Row(ids, labels, np.arange(24), np.zeros(24, dtype=np.int64)))
    return made


def _live(job):
    model, _ = load_base(job.model, **job.options)
    read_adapter(model, job.adapter)
    return model.eval()


@torch.no_grad()
def _logits(model):
    return model(IDS).logits.float()


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_transformers_gives_the_logits_of_base_and_adapter(
    tiny_model_folder, tmp_path, family
):
    job = _write_adapter(tiny_model_folder(family), tmp_path / "adapter", FLOAT32)
    merge(job, tmp_path / "merged", "16bit")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(_logits(merged.eval()), _logits(_live(job)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen3_moe"])
def test_weights_in_4_bits_are_merged_as_they_were_trained_on(tiny_model_folder, tmp_path, family):
    options = {**NF4, "dtype": torch.float32, "quant": {"block_size": 32, "double": True}}
    job = _write_adapter(tiny_model_folder(family), tmp_path / "adapter", options)
    assert job.options["storage"] == "nf4"
    assert job.options["quant"]["block_size"] == 32
    merge(job, tmp_path / "merged", "dequantized")
    merged, _ = load_base(str(tmp_path / "merged"), "float32")
    torch.testing.assert_close(_logits(merged), _logits(_live(job)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("onto", ["4bit", "4bit-search"])
def test_a_merge_in_4_bits_opens_here_and_in_transformers(
    tiny_model_folder, tmp_path, family, onto
):
    job = _write_adapter(tiny_model_folder(family), tmp_path / "adapter", NF4)
    merge(job, tmp_path / "merged", onto)
    ours, _ = load_base(str(tmp_path / "merged"), "nf4")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    stored, layer = ours.model.layers[0].self_attn.q_proj, theirs.model.layers[0].self_attn.q_proj
    assert torch.equal(layer.weight.data.flatten(), stored.codes)
    assert layer.weight.quant_state.nested
    weight = stored.dense_weight(torch.bfloat16).clone()
    dense, _ = load_base(job.model, "bf16")
    read_adapter(dense, job.adapter)
    layer = dense.model.layers[0].self_attn.q_proj
    wanted = layer.base.dense_weight(torch.float32) + layer.delta_weight()
    assert (weight.float() - wanted).norm() < 0.15 * wanted.norm()


def test_a_checkpoint_in_4_bits_is_merged_onto_its_own_codes(tiny_model_folder, tmp_path):
    first = _write_adapter(tiny_model_folder("llama"), tmp_path / "first", NF4)
    merge(first, tmp_path / "low", "4bit")
    job = _write_adapter(tmp_path / "low", tmp_path / "second", {**NF4, "dtype": torch.float32})
    with pytest.raises(UsageError, match="dequantized"):
        merge(job, tmp_path / "merged", "16bit")
    made = merge(job, tmp_path / "merged")
    assert made.onto == "dequantized"
    merged, _ = load_base(str(tmp_path / "merged"), "float32")
    torch.testing.assert_close(_logits(merged), _logits(_live(job)), rtol=1e-5, atol=1e-5)
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())


def test_auto_keeps_the_target_of_the_lowest_loss(tiny_model_folder, tmp_path, rows):
    job = _write_adapter(tiny_model_folder("llama"), tmp_path / "adapter", NF4)
    told = []
    made = merge(replace(job, rows=rows), tmp_path / "merged", anyway=True, tell=told.append)
    assert set(made.candidates) == {"dequantized", "16bit", "4bit", "4bit-search"}
    assert made.candidates[made.onto] == min(made.candidates.values())
    assert sum("measuring" in line for line in told) == 5
    assert json.loads((tmp_path / "merged" / CERTIFICATE_FILE).read_text()) == made.to_dict()
    assert made.measured.merged.num_target_tokens == 8 * 12
    assert sorted(os.listdir(tmp_path)) == ["adapter", "merged"]


def test_the_certificate_of_the_same_base_is_close_and_its_line_is_in_the_card(
    tiny_model_folder, tmp_path, rows
):
    job = _write_adapter(tiny_model_folder("llama"), tmp_path / "adapter", BF16, std=0.05)
    made = merge(replace(job, rows=rows), tmp_path / "merged", "16bit")
    assert made.problems == []
    assert made.measured.merged.mean_kl < 1e-3
    assert made.rounding.kept == pytest.approx(1, abs=0.01)
    assert made.sentence() in (tmp_path / "merged" / "README.md").read_text()


@pytest.mark.parametrize("options", [BF16, NF4])
@pytest.mark.parametrize("onto", ["4bit", "4bit-search"])
def test_an_update_below_the_rounding_step_is_refused(tiny_model_folder, tmp_path, options, onto):
    job = _write_adapter(tiny_model_folder("llama"), tmp_path / "adapter", options, std=1e-3)
    with pytest.raises(AdapterError, match=r"rms is \S+, that of the rounding step \S+") as caught:
        merge(job, tmp_path / "merged", onto)
    assert caught.value.exit_code == 65
    assert sorted(os.listdir(tmp_path)) == ["adapter"]
    made = merge(job, tmp_path / "merged", onto, anyway=True)
    assert made.problems
    assert not made.to_dict()["passed"]
    assert (tmp_path / "merged" / CERTIFICATE_FILE).is_file()


def test_an_update_below_the_step_of_bfloat16_is_refused(tiny_model_folder, tmp_path):
    job = _write_adapter(tiny_model_folder("llama"), tmp_path / "adapter", BF16, std=1e-5)
    with pytest.raises(AdapterError, match="is kept"):
        merge(job, tmp_path / "merged", "16bit")


def test_a_model_that_predicts_otherwise_is_refused(tiny_model_folder, tmp_path, rows, monkeypatch):
    job = _write_adapter(tiny_model_folder("llama"), tmp_path / "adapter", BF16)
    other = _write_adapter(tiny_model_folder("llama"), tmp_path / "other", BF16, std=0.4)
    monkeypatch.setattr(
        "nibble.adapter.merge.read_adapter", lambda model, _: read_adapter(model, other.adapter)
    )
    with pytest.raises(AdapterError, match="KL"):
        merge(replace(job, rows=rows), tmp_path / "merged", "16bit")
    assert not (tmp_path / "merged").exists()


def test_without_held_out_rows_auto_is_the_base_of_training(tiny_model_folder, tmp_path):
    job = _write_adapter(tiny_model_folder("llama"), tmp_path / "adapter", NF4)
    made = merge(job, tmp_path / "merged")
    assert (made.onto, made.measured, made.candidates) == ("dequantized", None, {})
    assert "not measured" in made.sentence()


def test_tokenizer_and_template_of_training_go_along(tiny_model_folder, tmp_path):
    folder = tiny_model_folder("llama")
    model, tokenizer = load_base(str(folder), **BF16)
    adapt(model, rank=2, generator=torch.Generator().manual_seed(0))
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.lora_B.data.fill_(0.05)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    write_adapter(model, tmp_path / "adapter", tokenizer=tokenizer)
    merge(Merge(tmp_path / "adapter", str(folder), None, BF16), tmp_path / "merged")
    merged = AutoTokenizer.from_pretrained(tmp_path / "merged")
    turns = [{"role": "user", "content": "hello"}]
    expected = tokenizer.apply_chat_template(turns, tokenize=False)
    assert merged.apply_chat_template(turns, tokenize=False) == expected == "[hello]"


def test_large_models_come_in_shards(tiny_model_folder, tmp_path, monkeypatch):
    job = _write_adapter(tiny_model_folder("llama"), tmp_path / "adapter", FLOAT32)
    monkeypatch.setattr("nibble.adapter.merged_weights.LARGEST_SHARD_BYTES", 100_000)
    merge(job, tmp_path / "merged", "16bit")
    names = sorted(path.name for path in (tmp_path / "merged").glob("*.safetensors"))
    assert names[0] == f"model-00001-of-{len(names):05}.safetensors"
    assert len(names) > 2
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(_logits(merged.eval()), _logits(_live(job)), rtol=1e-5, atol=1e-5)


def test_a_folder_that_holds_something_is_left_alone(tiny_model_folder, tmp_path):
    job = _write_adapter(tiny_model_folder("llama"), tmp_path / "adapter", BF16)
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine").write_text("kept")
    with pytest.raises(FolderInUseError):
        merge(job, tmp_path / "merged")
    assert (tmp_path / "merged" / "mine").read_text() == "kept"


def test_an_adapter_of_another_base(tiny_model_folder, tmp_path):
    job = _write_adapter(tiny_model_folder("llama"), tmp_path / "adapter", BF16)
    with pytest.raises(AdapterError):
        merge(replace(job, model=str(tiny_model_folder("falcon-7b"))), tmp_path / "merged")
    assert sorted(os.listdir(tmp_path)) == ["adapter"]
