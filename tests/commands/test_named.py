"""Adapters by name on the command line."""

import pytest

from nibble.commands.named import named_adapters
from nibble.errors import UsageError


def test_names_and_folders_in_order():
    found = named_adapters(["law=runs/law/adapter", "b-2=/x/y=z", "runs/a"])
    assert list(found.items()) == [
        ("law", "runs/law/adapter"), ("b-2", "/x/y=z"), ("adapter", "runs/a"),
    ]  # fmt: skip


def test_a_folder_whose_own_name_has_an_equals_sign(tmp_path, monkeypatch):
    (tmp_path / "lr=1").mkdir()
    monkeypatch.chdir(tmp_path)
    assert named_adapters(["lr=1"]) == {"adapter": "lr=1"}
    assert named_adapters(["runs/lr=1"]) == {"adapter": "runs/lr=1"}


@pytest.mark.parametrize("values", [["a", "b"], ["x=a", "x=b"], ["base=a"]])
def test_a_name_is_taken_once(values):
    with pytest.raises(UsageError, match="is taken"):
        named_adapters(values)
