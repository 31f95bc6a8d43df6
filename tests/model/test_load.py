"""Loading: storages, sources, ties, shards, and every way in which a checkpoint can be wrong."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from nibble.errors import ModelError, UnavailableError, UsageError
from nibble.kernels.nf4 import quantize
from nibble.model.ledger import resident_bytes
from nibble.model.linear4bit import DenseLinear, Linear4bit
from nibble.model.load import load_base

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tiny_model_folder, tmp_path):
    """A tiny Llama of one's own, to be damaged."""
    return shutil.copytree(tiny_model_folder("llama"), tmp_path / "model")


def edit_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    config.update(values)
    (folder / "config.json").write_text(json.dumps(config))


def edit_weights(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def shard(folder):
    """Split the checkpoint into three files and an index."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    weight_map = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        held = {name: tensors[name] for name in tensors if weight_map[name] == file}
        save_file(held, folder / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def test_storages(folder):
    weight = load_file(folder / WEIGHTS)[Q_PROJ]
    for storage, dtype in (("bf16", torch.bfloat16), ("float32", torch.float32)):
        model, tokenizer = load_base(str(folder), storage=storage)
        layer = model.get_submodule(Q_PROJ.removesuffix(".weight"))
        assert isinstance(layer, DenseLinear)
        assert torch.equal(layer.weight, weight.to(dtype))
        assert not model.training
        assert model.name_or_path == str(folder)
        assert tokenizer.decode(tokenizer.encode("hello")) == "hello"
    for storage in ("nf4", "fp4"):
        model, _ = load_base(str(folder), storage=storage)
        layer = model.get_submodule(Q_PROJ.removesuffix(".weight"))
        assert isinstance(layer, Linear4bit)
        assert torch.equal(layer.codes, quantize(weight, type=storage).codes)
        assert model.lm_head.weight.dtype == torch.bfloat16


def test_quantisation_settings(folder):
    settings = {"block_size": 128, "double": False, "search": True}
    model, _ = load_base(str(folder), storage="nf4", quant=settings)
    layer = model.get_submodule(Q_PROJ.removesuffix(".weight"))
    expected = quantize(load_file(folder / WEIGHTS)[Q_PROJ], **settings)
    assert torch.equal(layer.absmax, expected.absmax)
    assert layer.nested_absmax is None
    with pytest.raises(UsageError, match="'blocksize'"):
        load_base(str(folder), storage="nf4", quant={"blocksize": 64})


def test_full_training_keeps_the_layers_of_transformers(folder):
    model, _ = load_base(str(folder), storage="float32", trainable=True)
    layer = model.get_submodule(Q_PROJ.removesuffix(".weight"))
    assert type(layer) is nn.Linear
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    with pytest.raises(UsageError, match="cannot be trained"):
        load_base(str(folder), storage="nf4", trainable=True)


def test_full_training_of_a_mixture_reaches_its_experts(tiny_model_folder):
    folder = tiny_model_folder("mixtral")
    model, _ = load_base(str(folder), storage="float32", trainable=True)
    loss = model(torch.arange(6)[None], use_cache=False).logits.square().sum()
    loss.backward()
    assert model.model.layers[0].mlp.experts.gate_up_proj.grad is not None


def test_unknown_storage():
    with pytest.raises(UsageError, match="'int8'"):
        load_base("x", storage="int8")


def test_sharded_checkpoint(folder):
    whole, _ = load_base(str(folder))
    shard(folder)
    parts, _ = load_base(str(folder))
    for (name, ours), (_, theirs) in zip(
        parts.named_parameters(), whole.named_parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def test_tied_head_is_the_embedding_itself(tiny_model_folder):
    model, _ = load_base(str(tiny_model_folder("gemma")), storage="nf4")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not [kind for kind in resident_bytes(model) if kind.endswith("head")]


def test_tied_head_on_disk_may_repeat_the_embedding(folder):
    def repeat(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    edit_config(folder, tie_word_embeddings=True)
    with pytest.raises(ModelError, match="two different weights"):
        load_base(str(folder))
    edit_weights(folder, repeat)
    model, _ = load_base(str(folder))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_weights_do_not_follow_the_file(folder):
    """A model must not be a view of a file that may change."""
    model, _ = load_base(str(folder), storage="float32")
    before = model.model.embed_tokens.weight.clone()
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-100_000:] = bytes(100_000)
    with (folder / WEIGHTS).open("r+b") as file:
        file.write(content)
    assert torch.equal(model.model.embed_tokens.weight, before)


def test_names_that_could_run_code_are_dropped(folder):
    edit_config(
        folder,
        auto_map={"AutoModelForCausalLM": "evil--model.Evil"},
        _attn_implementation_internal="evil/kernel",
        rope_scaling_internal={"auto_map": "evil"},
    )
    model, _ = load_base(str(folder))
    assert model.config._attn_implementation == "nibble"
    assert not hasattr(model.config, "auto_map")


def test_an_unlisted_architecture_of_plain_linears_works(tmp_path, tiny_model_folder):
    from transformers import Olmo2Config

    config = Olmo2Config(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, pad_token_id=None, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model_folder("llama") / name, tmp_path)
    model, _ = load_base(str(tmp_path), storage="nf4")
    assert sum(isinstance(module, Linear4bit) for module in model.modules()) == 14


# Hub ids ---------------------------------------------------------------------------------------


@pytest.fixture
def hub_cache(folder, tmp_path, monkeypatch):
    """A cache in the layout of the hub that holds `folder` as someone/tiny."""
    commit = "a" * 40
    repository = tmp_path / "hub" / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(folder, repository / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_OFFLINE", True)
    return commit


@pytest.mark.parametrize("revision", [None, "main", "a" * 40])
def test_hub_id_comes_from_the_cache(hub_cache, revision):
    model, tokenizer = load_base("someone/tiny", revision=revision)
    assert model.name_or_path == "someone/tiny"
    assert tokenizer.eos_token == "</s>"


@pytest.mark.parametrize("name", ["someone/other", "someone"])
def test_hub_id_offline(hub_cache, name):
    with pytest.raises(UnavailableError, match="cannot be reached") as raised:
        load_base(name)
    assert raised.value.exit_code == 69
    assert "local folder" in raised.value.fix


# Broken checkpoints ----------------------------------------------------------------------------


def _rewrite(name, content):
    return lambda folder: (folder / name).write_text(content)


def _remove(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def _truncate(folder):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-1000])


def _lose_shard(folder):
    shard(folder)
    (folder / "model-1.safetensors").unlink()


def _truncate_shard(folder):
    shard(folder)
    content = (folder / "model-1.safetensors").read_bytes()
    (folder / "model-1.safetensors").write_bytes(content[:-1000])


def _lose_index(folder):
    shard(folder)
    (folder / "model.safetensors.index.json").unlink()


def _garble_index(folder):
    shard(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": [1]}')


def _pickle_only(folder):
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def _weights(change):
    return lambda folder: edit_weights(folder, change)


def _set(name, value):
    def change(tensors):
        tensors[name] = value(tensors[name]) if name in tensors else value(None)

    return _weights(change)


def _poison(value):
    def poison(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[7] = value
        return tensor

    return poison


def _config(**values):
    return lambda folder: edit_config(folder, **values)


NORM = "model.norm.weight"
BROKEN = {
    "no config": (_remove("config.json"), "holds no config.json"),
    "garbled config": (_rewrite("config.json", "{'a': 1"), "config.json is not valid JSON"),
    "config of another shape": (_rewrite("config.json", "[1]"), "names no model_type"),
    "unknown architecture": (_config(model_type="lama"), "unknown architecture 'lama'"),
    "value of the wrong type": (_config(hidden_size="wide"), "config.json does not fit 'llama'"),
    "sizes that do not divide": (_config(num_attention_heads=0), "'llama'"),
    "no weights": (_remove(WEIGHTS), "holds no weights"),
    "pickled weights": (_pickle_only, "pickled weights only (pytorch_model.bin)"),
    "truncated weights": (_truncate, "model.safetensors is cut off"),
    "empty weights": (_rewrite(WEIGHTS, ""), "model.safetensors is cut off"),
    "text for weights": (_rewrite(WEIGHTS, "version https://git-lfs"), "no safetensors file"),
    "missing shard": (_lose_shard, "shard model-1.safetensors is missing"),
    "truncated shard": (_truncate_shard, "model-1.safetensors is cut off"),
    "missing index": (_lose_index, "no model.safetensors.index.json"),
    "garbled index": (_garble_index, "index.json is broken"),
    "index nested without end": (
        _rewrite("model.safetensors.index.json", "[" * 100_000),
        "index.json is broken",
    ),
    "a million layers": (_config(num_hidden_layers=10**6), "the checkpoint has 21 tensors"),
    "missing tensor": (_weights(lambda t: t.pop(Q_PROJ)), f"lacks tensors of llama: {Q_PROJ}"),
    "unexpected tensor": (
        _set("model.layers.0.extra.weight", lambda _: torch.ones(2)),
        "llama does not have: model.layers.0.extra.weight",
    ),
    "one layer too few": (_config(num_hidden_layers=3), "lacks tensors of llama: model.layers.2"),
    "one layer too many": (_config(num_hidden_layers=1), "does not have: model.layers.1"),
    "wrong shape": (
        _config(intermediate_size=128),
        "down_proj.weight has shape (64, 96), expected (64, 128)",
    ),
    "NaN in a linear": (_set(Q_PROJ, _poison(float("nan"))), f"{Q_PROJ} holds NaN"),
    "infinity in a norm": (_set(NORM, _poison(float("inf"))), f"{NORM} holds NaN or infinite"),
    "8-bit integers": (_set(Q_PROJ, lambda t: t.to(torch.int8)), "is stored as int8"),
    "8-bit floats": (_set(Q_PROJ, lambda t: t.to(torch.float8_e4m3fn)), "as float8_e4m3fn"),
    "GPTQ": (_config(quantization_config={"quant_method": "gptq"}), "quantised by 'gptq'"),
    "AWQ": (_config(quantization_config={"quant_method": "awq"}), "quantised by 'awq'"),
    "GGUF": (_config(quantization_config={"quant_method": "gguf"}), "quantised by 'gguf'"),
    "8-bit bitsandbytes": (
        _config(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
        "bitsandbytes in 8 bits",
    ),
    "no tokenizer": (_remove("tokenizer.json"), "holds no tokenizer"),
    "garbled tokenizer": (_rewrite("tokenizer.json", "{"), "tokenizer in"),
    "garbled generation config": (
        _rewrite("generation_config.json", "{"),
        "generation_config.json is broken",
    ),
}


@pytest.mark.parametrize("storage", ["bf16", "nf4"])
@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoint(folder, case, storage):
    damage, fragment = BROKEN[case]
    damage(folder)
    with pytest.raises(ModelError) as raised:
        load_base(str(folder), storage=storage)
    assert fragment in raised.value.what
    assert raised.value.fix
    assert raised.value.exit_code == 65


def test_unknown_architecture_suggests_one(folder):
    edit_config(folder, model_type="lama")
    with pytest.raises(ModelError, match='did you mean "llama"'):
        load_base(str(folder))


@pytest.mark.parametrize("name", ["/no/such/folder", "./modle", "a/b/c", "", "two words/model"])
def test_no_such_folder(name, folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    with pytest.raises(UsageError, match=r"no such folder|neither a folder nor a hub id"):
        load_base(name)


def test_a_neighbour_is_suggested(folder):
    with pytest.raises(UsageError, match='did you mean "model"'):
        load_base(str(folder.parent / "modle"))


def test_a_file_is_no_folder(folder):
    with pytest.raises(UsageError, match="is a file"):
        load_base(str(folder / WEIGHTS))


def test_a_whole_expert_missing(tiny_model_folder, tmp_path):
    folder = shutil.copytree(tiny_model_folder("mixtral"), tmp_path / "model")
    edit_weights(
        folder, lambda t: [t.pop(name) for name in list(t) if "layers.1" in name and ".3.w" in name]
    )
    with pytest.raises(ModelError, match=r"layers\.1.*down_proj has shape \(3, 64, 96\)"):
        load_base(str(folder), storage="nf4")
