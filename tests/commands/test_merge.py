"""`nibble merge` as a person uses it."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import nibble
from nibble.commands.main import main


@pytest.fixture(scope="module")
def run_folder(tiny_model_folder, tmp_path_factory):
    """A finished QLoRA run of a few steps, with held-out rows."""
    place = tmp_path_factory.mktemp("runs")
    rows = [{"prompt": f"say {n}", "completion": f"{n} " * 4} for n in range(24)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = nibble.load_config(
        None,
        [
            f"model.name={tiny_model_folder('llama')}",
            f"data.train={place / 'rows.jsonl'}",
            f"out={place / 'run'}",
            "method=qlora",
            "data.eval=0.25",
            "data.max_seq_len=64",
            "train.steps=8",
            "train.batch_size=4",
            "optim.lr=0.02",
        ],
    )
    nibble.train(run)
    return place / "run"


def _call(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        main(["merge", *map(str, words)])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return stop.value.code, out, err


def test_a_run_is_merged_with_what_it_knows(run_folder, tmp_path, capsys):
    code, out, err = _call(capsys, "--adapter", run_folder, "--out", tmp_path / "merged")
    assert (code, "held-out loss" in out, "nibble chat" in err) == (0, True, True)
    values = json.loads((tmp_path / "merged" / "certificate.json").read_text())
    assert values["trained_on"] == "nf4"
    assert set(values["candidates"]) == {"dequantized", "16bit", "4bit", "4bit-search"}
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")


def test_json_is_the_certificate(run_folder, tmp_path, capsys):
    words = ("--adapter", run_folder / "adapter", "--out", tmp_path / "m", "--onto", "dequantized")
    code, out, _ = _call(capsys, *words, "--json")
    assert code == 0
    assert json.loads(out) == json.loads((tmp_path / "m" / "certificate.json").read_text())


def test_an_adapter_without_its_run_is_not_measured_unless_data_is_given(
    run_folder, tmp_path, capsys
):
    (tmp_path / "lone").mkdir()
    for path in (run_folder / "adapter").iterdir():
        (tmp_path / "lone" / path.name).write_bytes(path.read_bytes())
    code, out, _ = _call(capsys, "--adapter", tmp_path / "lone", "--out", tmp_path / "a")
    assert (code, "give --data" in out) == (0, True)
    data = run_folder.parent / "rows.jsonl"
    words = ("--adapter", tmp_path / "lone", "--out", tmp_path / "b", "--data", data)
    code, out, _ = _call(capsys, *words, "--onto", "dequantized")
    assert (code, "held-out loss" in out) == (0, True)


def test_the_type_can_be_asked_for(run_folder, tmp_path, capsys):
    words = ("--adapter", run_folder, "--out", tmp_path / "m", "--onto", "16bit")
    assert _call(capsys, *words, "--dtype", "float32", "--anyway")[0] == 0
    weights = AutoModelForCausalLM.from_pretrained(tmp_path / "m").state_dict()
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--onto", "8bit"], 2, "use one of dequantized, 16bit"),
        (["--method", "full"], 2, "expected lora or qlora"),
        (["--dtype", "int8"], 2, "expected one of bfloat16"),
        (["--model", "/nowhere/at/all"], 2, "there is no such folder"),
        (["--data", "/nowhere.jsonl"], 65, "nowhere.jsonl"),
    ],
)
def test_bad_input(run_folder, tmp_path, capsys, words, code, message):
    found = _call(capsys, "--adapter", run_folder, "--out", tmp_path / "m", *words)
    assert (found[0], message in found[2]) == (code, True), found
    assert not (tmp_path / "m").exists()


def test_no_adapter(tmp_path, capsys):
    code, _, err = _call(capsys, "--adapter", tmp_path / "none", "--out", tmp_path / "m")
    assert (code, "there is no adapter folder" in err) == (65, True)
