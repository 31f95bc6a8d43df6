"""Adapters come and go; the base stays what it was."""

import pytest
import torch

from nibble.adapter.format import read_adapter, write_adapter
from nibble.adapter.many import Adapters
from nibble.errors import AdapterError, UsageError
from nibble.model.adapt import adapt
from nibble.model.load import load_base


def _folder(base_folder, folder, seed, **settings):
    model, _ = load_base(str(base_folder), "float32")
    adapt(model, rank=4, alpha=8, **settings)
    with torch.no_grad():
        for key, factor in model.named_parameters():
            if key.endswith("lora_B"):
                factor.normal_(0, 0.2, generator=torch.Generator().manual_seed(seed))
    return write_adapter(model, folder)


def _logits(model):
    with torch.no_grad():
        return model(torch.arange(5, 25)[None]).logits


@pytest.mark.parametrize("family", ["llama", "falcon-7b", "phi3", "mixtral", "qwen3_moe"])
def test_a_chosen_adapter_is_the_adapter_alone(tiny_model_folder, tmp_path, family):
    base_folder = tiny_model_folder(family)
    folders = {name: _folder(base_folder, tmp_path / name, n) for n, name in enumerate("ab")}
    model, _ = load_base(str(base_folder), "float32")
    names, before = [name for name, _ in model.named_modules()], _logits(model)
    adapters = Adapters(model)
    for name, folder in folders.items():
        adapters.load(name, folder)
    assert adapters.names == ("a", "b")
    for name, folder in folders.items():
        alone, _ = load_base(str(base_folder), "float32")
        read_adapter(alone, folder)
        with adapters.chosen(name):
            found = _logits(model)
        torch.testing.assert_close(found, _logits(alone), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(found, before, rtol=1e-2, atol=1e-2)
    with adapters.chosen(None):
        assert torch.equal(_logits(model), before)
    assert torch.equal(_logits(model), before)
    adapters.unload("a")
    adapters.unload("b")
    assert adapters.names == ()
    assert [name for name, _ in model.named_modules()] == names
    assert torch.equal(_logits(model), before)


def test_adapters_of_different_layers_stand_side_by_side(tiny_model_folder, tmp_path):
    base_folder = tiny_model_folder("llama")
    first = _folder(base_folder, tmp_path / "first", 1, target=["q_proj"])
    second = _folder(base_folder, tmp_path / "second", 2, target=["q_proj", "down_proj"])
    model, _ = load_base(str(base_folder), "float32")
    adapters = Adapters(model)
    adapters.load("first", first)
    with adapters.chosen("first"):
        expected = _logits(model)
    adapters.load("second", second)
    with adapters.chosen("first"):
        assert torch.equal(_logits(model), expected)
    adapters.unload("second")
    with adapters.chosen("first"):
        assert torch.equal(_logits(model), expected)


def test_names_are_taken_once_and_must_be_known(tiny_model_folder, tmp_path):
    folder = _folder(tiny_model_folder("llama"), tmp_path / "a", 0)
    model, _ = load_base(str(tiny_model_folder("llama")), "float32")
    adapters = Adapters(model)
    adapters.load("law", folder)
    with pytest.raises(UsageError, match="loaded already"):
        adapters.load("law", folder)
    with pytest.raises(UsageError, match="law"):
        adapters.unload("lawn")
    with pytest.raises(UsageError, match="lawn"), adapters.chosen("lawn"):
        pass
    with pytest.raises(UsageError, match="adapted already"):
        Adapters(model)


def test_a_folder_that_does_not_fit_leaves_the_model(tiny_model_folder, tmp_path):
    folder = _folder(tiny_model_folder("phi3"), tmp_path / "a", 0)
    model, _ = load_base(str(tiny_model_folder("llama")), "float32")
    adapters, before = Adapters(model), _logits(model)
    with pytest.raises(AdapterError, match="does not have"):
        adapters.load("a", folder)
    (folder / "adapter_model.safetensors").write_bytes(b"broken")
    with pytest.raises(AdapterError, match="broken"):
        adapters.load("a", folder)
    assert adapters.names == ()
    assert torch.equal(_logits(model), before)
