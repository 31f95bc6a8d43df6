"""`nibble data check` as a person types it."""

import json

import pytest
from typer.testing import CliRunner

from nibble.commands.data import app
from nibble.errors import ModelError, UnavailableError, UsageError

GOOD = '{"prompt": "Say [bold]a[/bold]", "completion": "b"}\n'


@pytest.fixture
def run(shared, tmp_path):
    def invoke(content, *flags, model=None):
        path = tmp_path / "train.jsonl"
        path.write_text(content)
        model = model or str(shared / "models" / "base-16m")
        return CliRunner().invoke(app, ["check", str(path), "--model", model, *flags])

    return invoke


def test_prints_rows_with_the_trained_part_marked(run):
    result = run(GOOD)
    assert result.exit_code == 0, result.output
    assert "format prompt-completion, 1 rows" in result.stdout
    assert "Say [bold]a[/bold]<|im_end|>" in result.stdout
    assert "[[b<|im_end|>]]" in result.stdout
    assert result.stdout.rstrip().endswith("good")


def test_json_is_one_document(run):
    result = run(GOOD, "--json")
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert document["version"] == 1
    assert document["train"]["num_rows"] == 1
    assert document["settings"]["max_seq_len"] == 2048  # the default of the config


def test_bad_rows_end_with_65(run):
    result = run(GOOD + "{\n", "--json")
    assert result.exit_code == 65
    (bad,) = json.loads(result.stdout)["train"]["bad_rows"]
    assert bad["line"] == 2
    result = run(GOOD + "{\n")
    assert result.exit_code == 65
    assert "train.jsonl:2: column 2" in result.stdout
    assert "fix: correct the JSON" in result.stdout


def test_flags_are_checked_by_the_config(run):
    result = run(GOOD, "--max-seq-len", "1")
    assert isinstance(result.exception, UsageError)
    assert "--max-seq-len 1" in str(result.exception)
    assert isinstance(run(GOOD, "--train-on", "user").exception, UsageError)


def test_model_without_tokenizer(run, tmp_path):
    (tmp_path / "empty").mkdir()
    assert isinstance(run(GOOD, model=str(tmp_path / "empty")).exception, ModelError)
    assert isinstance(run(GOOD, model="no-such/model").exception, UnavailableError)
