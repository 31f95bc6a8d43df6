"""Fixtures of the data room: a byte-level tokenizer and conversations."""

import importlib.util
import json
from pathlib import Path

import pytest

from nibble.commands import data
from nibble.commands.main import main
from nibble.data.turns import Conversation, Message

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="session")
def golden():
    """The module tests/golden/make_masks.py."""
    spec = importlib.util.spec_from_file_location("make_masks", GOLDEN / "make_masks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def _byte_tokenizer(golden):
    return golden.byte_tokenizer()


@pytest.fixture
def byte_tokenizer(_byte_tokenizer, golden):
    """A byte-level tokenizer with the ChatML template; tests may set another."""
    _byte_tokenizer.chat_template = golden.CHATML
    return _byte_tokenizer


@pytest.fixture(scope="session")
def talk():
    """talk("user: Hi", "assistant: Yes") is a Conversation."""

    def build(*turns, trained=(), **more):
        messages = []
        for number, turn in enumerate(turns):
            role, _, text = turn.partition(": ")
            is_trained = dict(trained).get(number)
            messages.append(Message(role, text, is_trained))
        return Conversation(tuple(messages), "talk.jsonl", 7, **more)

    return build


@pytest.fixture
def write(tmp_path):
    """write("a.jsonl", text or bytes) gives the path."""

    def build(name, content):
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return build


@pytest.fixture
def check(byte_tokenizer, monkeypatch, capsys):
    """check(path) runs `nibble data check`: exit code, the JSON document or None, stderr."""
    monkeypatch.setattr(data, "load_tokenizer", lambda _model: byte_tokenizer)

    def run(path):
        with pytest.raises(SystemExit) as info:
            main(["data", "check", str(path), "--model", "any", "--json"])
        out, err = capsys.readouterr()
        return info.value.code, json.loads(out) if out else None, err

    return run


@pytest.fixture
def bad_row_of(check):
    """bad_row_of(path, num_good=2) is the one bad row of a file; so many others are read."""

    def find(path, *, num_good):
        code, document, _ = check(path)
        assert code == 65
        assert document["is_good"] is False
        assert document["train"]["num_rows"] == num_good
        (bad,) = document["train"]["bad_rows"]
        return bad

    return find
