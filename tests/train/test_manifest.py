"""The identity of a run changes with everything that decides its course, and with nothing else."""

import json
import shutil

import pytest
from transformers import AutoTokenizer

from nibble.config import load_config
from nibble.data.chat import Example
from nibble.data.dataset import Dataset, DatasetReport
from nibble.data.packing import pack
from nibble.errors import DiskError
from nibble.train import manifest
from nibble.train.folder import INPUTS
from nibble.train.manifest import (
    MANIFEST_FILE,
    differences,
    environment,
    identity_of,
    read_manifest,
    write_manifest,
)


@pytest.fixture
def parts(tiny_model_folder, tmp_path):
    """A copy of a model folder and a file of rows, to be changed."""
    shutil.copytree(tiny_model_folder("llama"), tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    return tmp_path


def _identity(parts, *more, rows=()):
    settings = [f"model.name={parts / 'model'}", f"data.train={parts / 'rows.jsonl'}", *more]
    tokenizer = AutoTokenizer.from_pretrained(parts / "model")
    return identity_of(load_config(None, settings), tokenizer, _dataset(rows))


def _dataset(rows=()):
    report = DatasetReport(train=None, eval=None, formats=(), num_duplicates=0)
    return Dataset(list(rows), [], report, [])


def _change_base(parts):
    path = parts / "model" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _change_config(parts):
    path = parts / "model" / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "rms_norm_eps": 1e-3}))


def _change_data(parts):
    (parts / "rows.jsonl").write_text('{"prompt": "a", "completion": "c"}\n')


def _change_tokenizer(parts):
    path = parts / "model" / "tokenizer.json"
    path.write_text(path.read_text() + " ")


def _change_template(parts):
    path = parts / "model" / "chat_template.jinja"
    path.write_text(path.read_text() + "!")


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (_change_base, ["base"]),
        (_change_config, ["base"]),
        (_change_data, ["data"]),
        (_change_tokenizer, ["tokenizer"]),
        (_change_template, ["template"]),
        (lambda parts: None, []),
    ],
)
def test_what_changes_is_named(parts, change, names):
    before = _identity(parts)
    change(parts)
    assert list(differences(before, _identity(parts))) == names


def test_every_config_value_counts_but_the_folder(parts):
    before = _identity(parts)
    assert differences(before, _identity(parts, "out=elsewhere")) == {}
    changed = differences(before, _identity(parts, "optim.lr=1e-5"))
    assert changed == {"optim.lr": ("0.0002", "1e-05")}


def test_rows_count_token_by_token(parts):
    def rows(*ids):
        return pack([Example(list(ids), list(ids), "", 0)], max_seq_len=8)

    same = _identity(parts, rows=rows(5, 6))
    assert differences(same, _identity(parts, rows=rows(5, 6))) == {}
    for other in (rows(5, 7), rows(5), rows(5, 6) * 2):
        assert list(differences(same, _identity(parts, rows=other))) == ["rows"]


def test_a_model_that_is_moved_is_the_same_base(parts):
    before = _identity(parts)
    (parts / "model").rename(parts / "moved")
    tokenizer = AutoTokenizer.from_pretrained(parts / "moved")
    settings = [f"model.name={parts / 'moved'}", f"data.train={parts / 'rows.jsonl'}"]
    after = identity_of(load_config(None, settings), tokenizer, _dataset())
    assert list(differences(before, after)) == ["model.name"]


def test_rows_that_cannot_be_read_again(parts):
    (parts / "rows.jsonl").chmod(0)
    try:
        (parts / "rows.jsonl").read_text()
    except PermissionError:
        with pytest.raises(DiskError, match="cannot read what the run is made of"):
            _identity(parts)
    else:
        pytest.skip("this user may read everything")


def test_round_trip_and_what_cannot_be_read(tmp_path):
    assert read_manifest(tmp_path) == ({}, {})
    write_manifest(tmp_path, {"data": "x"}, {"torch": "2"})
    assert read_manifest(tmp_path) == ({"data": "x"}, {"torch": "2"})
    for content in ("", "{", "[]", "7", '{"identity": 3}', '{"identity": {}, "environment": 1}'):
        (tmp_path / MANIFEST_FILE).write_text(content)
        assert read_manifest(tmp_path) == ({}, {})
    (tmp_path / MANIFEST_FILE).write_text('{"identity": {"a": 1}, "environment": {"threads": 1}}')
    assert read_manifest(tmp_path) == ({}, {})


def test_what_a_run_is_made_of_is_its_config_and_its_inputs(parts):
    assert {*_identity(parts)} == {*load_config(None).flat()} - {"out"} | {*INPUTS}


def test_differences_name_what_one_side_lacks():
    assert differences({"a": "1", "b": "2"}, {"a": "1", "c": "3"}) == {
        "b": ("2", "not there"),
        "c": ("not there", "3"),
    }


def test_the_environment_says_what_bits_depend_on(monkeypatch, tmp_path):
    now = environment()
    assert now == environment()
    assert {"torch", "threads", "processor", "instructions", "device", "code"} <= now.keys()
    assert now["device"] == "cpu" or now["cuda"] != "none"
    (tmp_path / "cpuinfo").write_text("model name\t: Some CPU\n")
    monkeypatch.setattr(manifest, "_CPU_INFO", tmp_path / "cpuinfo")
    assert environment()["processor"] == "Some CPU"
    monkeypatch.setattr(manifest, "_CPU_INFO", tmp_path / "none")
    assert "processor" in environment()
