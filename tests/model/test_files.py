"""Finding a checkpoint and reading what it is."""

import json

import pytest
import torch
from safetensors.torch import save_file

from nibble.errors import ModelError
from nibble.model.files import find_model, read_config, read_index


@pytest.fixture
def folder(tmp_path):
    save_file({"a": torch.ones(4)}, tmp_path / "one.safetensors")
    save_file({"b": torch.ones(2), "c": torch.ones(1)}, tmp_path / "two.safetensors")
    write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"})
    return tmp_path


def write_index(folder, weight_map):
    index = {"metadata": {"total_size": 28}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_sharded_checkpoint(folder):
    entries = read_index(folder)
    assert {name: entry.path.name for name, entry in entries.items()} == {
        "a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"
    }  # fmt: skip
    assert sum(entry.num_bytes for entry in entries.values()) == 28
    assert entries["b"].shape == (2,)


def test_an_index_cannot_point_outside_the_folder(folder):
    outside = folder / "sub"
    outside.mkdir()
    save_file({"a": torch.ones(1)}, folder / "outside.safetensors")
    write_index(outside, {"a": "../outside.safetensors"})
    with pytest.raises(ModelError, match=r"shard outside.safetensors is missing"):
        read_index(outside)


def test_an_index_that_names_an_absent_tensor(folder):
    write_index(folder, {"a": "one.safetensors", "x": "two.safetensors"})
    with pytest.raises(ModelError, match=r"two\.safetensors lacks the tensor 'x'"):
        read_index(folder)


def test_config_without_what_could_name_code(tmp_path):
    config = {
        "model_type": "llama",
        "hidden_size": 8,
        "auto_map": {"AutoConfig": "x--y.Z"},
        "_attn_implementation": "evil/kernel",
        "_commit_hash": "1",
        "experts_implementation_internal": "evil/kernel",
        "rope_parameters": {"rope_theta": 1.0, "auto_map": "x", "_y": 1},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_config(tmp_path) == {
        "model_type": "llama", "hidden_size": 8, "rope_parameters": {"rope_theta": 1.0}
    }  # fmt: skip


@pytest.mark.parametrize(
    "content", [b"\xff\xfe\x00", b"{", b"null", b'{"model_type": 3}', b"[" * 100_000]
)
def test_config_that_is_none(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"config\.json"):
        read_config(tmp_path)


def test_find_model_takes_a_folder_as_it_is(tmp_path, monkeypatch):
    assert find_model(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m").mkdir()
    assert find_model("~/m") == tmp_path / "m"


@pytest.fixture
def snapshot(folder, tmp_path):
    """The folder as the cache of the hub keeps it: links to blobs."""
    repository = tmp_path / "models--someone--tiny"
    made = repository / "snapshots" / ("a" * 40)
    made.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted(folder.glob("*.*"))):
        path.rename(repository / "blobs" / str(number))
        (made / path.name).symlink_to(f"../../blobs/{number}")
    return made


def test_the_cache_of_the_hub_is_made_of_links(snapshot):
    assert set(read_index(snapshot)) == {"a", "b", "c"}


def test_a_snapshot_links_to_its_own_blobs_only(snapshot, tmp_path):
    outside = tmp_path / "outside.json"
    outside.write_text("{}")
    (snapshot / "config.json").symlink_to(outside)
    with pytest.raises(ModelError, match="leaves its folder"):
        read_index(snapshot)


def test_blobs_may_not_be_a_link_themselves(snapshot, tmp_path):
    blobs = snapshot.parents[1] / "blobs"
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match="leaves its folder"):
        read_index(snapshot)


@pytest.mark.parametrize("key", ["hidden_act", "model_type", "rope_type"])
def test_a_choice_that_is_no_word_is_refused(key, tmp_path):
    config = {"model_type": "llama", "hidden_size": 8, key: "../a"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=f"{key} is '../a', expected a word"):
        read_config(tmp_path)
