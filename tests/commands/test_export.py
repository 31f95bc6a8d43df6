"""`nibble export` and `nibble train --serve` as a person uses them."""

import json

import pytest

from nibble.adapter.format import write_adapter
from nibble.commands.main import main
from nibble.model.adapt import adapt
from nibble.model.load import load_base


def _call(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    out, err = capsys.readouterr()
    return stop.value.code, out, err


@pytest.fixture(scope="module")
def adapter(tiny_model_folder, tmp_path_factory):
    folder = tiny_model_folder("llama")
    model, tokenizer = load_base(str(folder), "float32")
    adapt(model, rank=4, alpha=8)
    out = tmp_path_factory.mktemp("adapter") / "adapter"
    return write_adapter(model, out, tokenizer=tokenizer, base=str(folder))


def test_vllm(capsys, adapter, tmp_path):
    code, out, err = _call(capsys, "export", "vllm", "--adapter", adapter, "--out", tmp_path / "x")
    assert code == 0, err
    assert out.splitlines()[-1].startswith("vllm serve ")
    assert "--max-lora-rank 8" in out
    assert "served as rank 8" in err


def test_dry_run_lists_and_uploads_nothing(capsys, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr("nibble.adapter.push.HfApi", None)
    words = ["export", "vllm", "--adapter", adapter, "--out", tmp_path, "--push", "me/one"]
    code, out, _ = _call(capsys, *words, "--dry-run")
    assert code == 0
    assert "would be uploaded to me/one" in out
    code, out, _ = _call(capsys, *words, "--dry-run", "--json")
    report = json.loads(out)
    assert report["version"] == 1
    assert report["push"]["adapter_model.safetensors"] > 0
    assert "address" not in report


def test_push_offline(capsys, adapter, tmp_path):
    words = ["export", "vllm", "--adapter", adapter, "--out", tmp_path, "--push", "me/one"]
    code, _, err = _call(capsys, *words)
    assert (code, "cannot be reached" in err) == (69, True)


WRONG = {
    "target": (["vlm"], 'did you mean "vllm"'),
    "dtype": (["gguf", "--dtype", "q4"], "--dtype is 'q4'"),
    "dry run alone": (["gguf", "--dry-run"], "need --push"),
    "name": (["gguf", "--push", "one"], "owner/name"),
    "merged for vllm": (["vllm", "--merged", "/tmp"], "as it is"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_words(capsys, adapter, tmp_path, case):
    words, message = WRONG[case]
    flags = ["--adapter", adapter, "--out", tmp_path / "out"]
    code, _, err = _call(capsys, "export", *words, *flags)
    assert (code, message in err) == (2, True), err


SERVED = {
    "rank": ("llama", "vllm", ["lora.rank=600"], 2, "lora.rank=512"),
    "family": ("falcon-7b", "vllm", [], 2, "no adapters of falcon"),
    "head": ("llama", "vllm", ["lora.target=[q_proj,lm_head]"], 2, "lm_head"),
    "experts": ("mixtral", "vllm", [], 2, "changes experts"),
    "target": ("llama", "tgi", [], 2, "unknown target 'tgi'"),
    "between": ("llama", "vllm", ["lora.rank=24", "train.steps=1"], 0, "served as rank 32"),
    "ollama": ("llama", "ollama", ["train.steps=1"], 0, "merge it"),
}


@pytest.mark.parametrize("case", SERVED)
def test_limits_are_asked_before_training(capsys, tiny_model_folder, tmp_path, case):
    family, target, settings, expected, message = SERVED[case]
    data = tmp_path / "train.jsonl"
    rows = [{"prompt": f"say {word}", "completion": word} for word in ("one", "two")]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--model", tiny_model_folder(family), "--data", data, "--method", "lora"]
    words += [word for setting in settings for word in ("--set", setting)]
    words += ["--set", "data.max_seq_len=64", "--out", tmp_path / "out", "--serve", target]
    code, _, err = _call(capsys, "train", *words)
    assert (code, message in err) == (expected, True), err
    assert (tmp_path / "out").exists() == (expected == 0)
