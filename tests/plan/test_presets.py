"""Presets are the models they name: transformers builds each to its published size."""

import json
import subprocess
import sys
from collections import Counter
from importlib.resources import files

import pytest
import torch

from nibble.model.skeleton import build_config, build_skeleton
from nibble.plan.presets import find_preset, preset_config, preset_names, preset_short_names


@pytest.mark.parametrize("name", preset_names())
def test_the_number_of_parameters_is_the_published_one(name):
    preset = find_preset(name)
    counted = _count(preset.config)
    if preset.is_exact:
        assert counted == preset.num_parameters
    else:
        assert counted == pytest.approx(preset.num_parameters, rel=0.01)


@pytest.mark.parametrize("name", preset_names())
def test_transformers_understands_the_values(name):
    values = preset_config(name)
    config = build_config(values)
    ropes = config.rope_parameters
    if values["model_type"] == "gemma3_text":
        local, ropes = ropes["sliding_attention"], ropes["full_attention"]
        assert (local["rope_type"], local["rope_theta"]) == ("default", 10_000)
    assert ropes["rope_theta"] == values["rope_theta"]
    expected = values.get("rope_scaling", {"rope_type": "default"})
    assert {key: ropes[key] for key in expected} == expected
    unknown = set(values) - set(config.to_dict()) - _OLD_KEYS
    assert not unknown, "transformers would ignore them"


# Keys of config.json that transformers 5 reads and stores under another name.
_OLD_KEYS = {
    "rope_theta",
    "rope_scaling",
    "rope_local_base_freq",
    "sliding_window_pattern",
    "num_experts",
}


def test_layers_alternate_as_published():
    def kinds(name):
        return Counter(build_config(preset_config(name)).layer_types)

    assert kinds("gemma-2-9b") == {"sliding_attention": 21, "full_attention": 21}
    assert kinds("gemma-3-12b-text") == {"sliding_attention": 40, "full_attention": 8}
    assert kinds("qwen2.5-7b") == {"full_attention": 28}


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B"),
        ("META-LLAMA/meta-llama-3.1-8b", "meta-llama/Llama-3.1-8B"),
        ("llama-3.1-8b-instruct", "meta-llama/Llama-3.1-8B"),
        (" Qwen2.5-7B ", "Qwen/Qwen2.5-7B"),
        ("llama-33b", "huggyllama/llama-30b"),
        ("phi-4", "microsoft/phi-4"),
        ("gemma-3-1b-text", "google/gemma-3-1b-pt"),
    ],
)
def test_spellings(spelling, name):
    assert find_preset(spelling).name == name


@pytest.mark.parametrize("name", ["", "/", "my/own-model", "llama", "google/gemma-3-4b-pt"])
def test_unknown_names_give_none(name):
    assert find_preset(name) is None
    assert preset_config(name) is None


def test_every_spelling_names_one_model():
    owners = {}
    for name in preset_names():
        preset = find_preset(name)
        assert find_preset(preset.short) is preset
        for spelling in {preset.name, preset.short, *preset.aliases}:
            bare = spelling.split("/")[-1].lower()
            assert owners.setdefault(bare, preset) is preset, spelling
    assert len(set(preset_names())) == len(preset_names()) == len(preset_short_names())


def test_callers_cannot_change_a_preset():
    preset_config("llama-3.1-8b")["rope_scaling"]["factor"] = 1.0
    assert preset_config("llama-3.1-8b")["rope_scaling"]["factor"] == 8.0


def test_families_name_their_source():
    families = json.loads((files("nibble.plan") / "presets.json").read_text(encoding="utf-8"))
    assert all(family["source"] and family["models"] for family in families)


def test_presets_need_no_torch():
    code = (
        "import sys\n"
        "from nibble.plan.presets import preset_config\n"
        "assert preset_config('llama-2-7b')\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _count(values):
    """Parameters of the whole model: linear in the layers, so two small ones tell it."""
    one, two = (_build_and_count({**values, "num_hidden_layers": n}) for n in (1, 2))
    return one + (two - one) * (values["num_hidden_layers"] - 1)


def _build_and_count(values):
    model = build_skeleton(build_config(values), torch.bfloat16)
    model.tie_weights()
    assert all(parameter.is_meta for parameter in model.parameters())
    return sum(parameter.numel() for parameter in model.parameters())
