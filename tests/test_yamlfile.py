"""YAML with the line of every key."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nibble import yamlfile
from nibble.errors import UsageError


def test_lines_of_keys(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("\ufeffa: 1\nb:\n  c: 2\n")
    assert yamlfile.read(path) == ({"a": 1, "b": {"c": 2}}, {"a": 1, "b": 2, "b.c": 3})


def test_empty_file(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("")
    assert yamlfile.read(path) == ({}, {})


def test_a_value_leaves_room_in_the_file_of_a_run():
    value = f"[{'x, ' * (yamlfile.MOST_VALUE // 3 - 1)}x]"
    assert len(yamlfile.parse_value(value)) == yamlfile.MOST_VALUE // 3
    with pytest.raises(UsageError, match="longer than 32 KiB"):
        yamlfile.parse_value(value + " " * 9)


def test_value_that_is_no_yaml_stays_text():
    assert yamlfile.parse_value("[1") == "[1"


@pytest.mark.parametrize("text", ["yes", "No", "010", "0x10", "1_000", "1:30", "2024-01-01", "1e"])
def test_what_only_old_yaml_calls_a_value_is_text(text):
    assert yamlfile.parse_value(text) == text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("-3", -3),
        ("+.5", 0.5),
        ("2.", 2.0),
        (".inf", math.inf),
        ("null", None),
        ("", None),
        ("~", None),
        ("True", True),
        ("false", False),
        ("'8'", "8"),
        ("[1, a]", [1, "a"]),
    ],
)
def test_plain_values(text, value):
    found = yamlfile.parse_value(text)
    assert (found, type(found)) == (value, type(value))


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20))
def test_what_json_writes_is_read_back(text):
    assert yamlfile.parse_value(json.dumps(text)) == text
