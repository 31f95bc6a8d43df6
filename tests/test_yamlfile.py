"""YAML with the line of every key."""

from nibble import yamlfile


def test_lines_of_keys(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("\ufeffa: 1\nb:\n  c: 2\n")
    assert yamlfile.read(path) == ({"a": 1, "b": {"c": 2}}, {"a": 1, "b": 2, "b.c": 3})


def test_empty_file(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("")
    assert yamlfile.read(path) == ({}, {})


def test_value_that_is_no_yaml_stays_text():
    assert yamlfile.parse_value("[1") == "[1"
