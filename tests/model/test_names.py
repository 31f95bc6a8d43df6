"""Names on disk and names in the model."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from nibble.errors import ModelError
from nibble.model.files import read_config, read_index
from nibble.model.names import match_names, tied_names
from nibble.model.skeleton import build_config, build_skeleton
from nibble.model.tensors import TensorReader


def matched(folder):
    model = build_skeleton(build_config(read_config(folder)), torch.float32)
    entries = read_index(folder)
    return model, entries, {t.name: t for t in match_names(model, entries, folder)}


def test_dense_names_are_the_same(tiny_model_folder):
    model, entries, targets = matched(tiny_model_folder("llama"))
    assert set(targets) == set(entries) == set(model.state_dict())
    assert all(t.convert is None and t.sources == (entries[n],) for n, t in targets.items())


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_are_stacked_as_transformers_stacks_them(family, tiny_model_folder):
    folder = tiny_model_folder(family)
    _, entries, targets = matched(folder)
    reference = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    reader = TensorReader(entries.values())
    stacked = [target for target in targets.values() if target.convert]
    assert len(stacked) == 4
    for target in stacked:
        experts = target.parts(reader.read)
        expected = reference[target.name]
        assert target.num_parts == len(experts) == len(expected)
        assert torch.equal(torch.cat([read() for read in experts]), expected)


def test_tied_names(tiny_model_folder):
    model, _, targets = matched(tiny_model_folder("gemma"))
    assert tied_names(model) == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head.weight" not in targets
    untied, _, _ = matched(tiny_model_folder("llama"))
    assert tied_names(untied) == {}


def write(folder, tmp_path, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    return matched(tmp_path)


def test_tables_of_old_checkpoints_are_ignored(tiny_model_folder, tmp_path):
    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    _, _, targets = write(tiny_model_folder("llama"), tmp_path, add)
    assert not [name for name in targets if "rotary" in name]


def test_many_unexpected_tensors_are_not_all_listed(tiny_model_folder, tmp_path):
    def add(tensors):
        tensors.update({f"extra.{i}": torch.ones(1) for i in range(9)})

    with pytest.raises(ModelError, match=r"extra\.0, extra\.1.*and 4 more"):
        write(tiny_model_folder("llama"), tmp_path, add)


def test_one_expert_missing(tiny_model_folder, tmp_path):
    def remove(tensors):
        name = next(n for n in tensors if "experts.2" in n)
        del tensors[name]

    with pytest.raises(ModelError, match=r"tensors that make .*gate_up_proj: it has 3 of"):
        write(tiny_model_folder("mixtral"), tmp_path, remove)
