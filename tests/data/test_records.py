"""Reading whole files: containers, line numbers, bad rows handed over, hub ids."""

import builtins
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nibble.data.records import read_records
from nibble.errors import DataError, UnavailableError

ROWS = [{"prompt": f"q{i}\n,", "completion": f'"a{i}" é'} for i in range(3)]
JSONL = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
BOM = b"\xef\xbb\xbf"


def read(path, **options):
    return [
        (row.line, row.messages[0].content, row.messages[1].content)
        for row in read_records(path, **options)
    ]


def errors_of(path):
    """What is wrong with a file: nothing, or one DataError."""
    try:
        assert all(row.messages for row in read_records(path))
    except DataError as error:
        return [error]
    return []


EXPECTED = [(i + 1, f"q{i}\n,", f'"a{i}" é') for i in range(3)]


@pytest.mark.parametrize(
    ("name", "content", "lines"),
    [
        ("a.jsonl", JSONL, (1, 2, 3)),
        ("newline.jsonl", JSONL + "\n", (1, 2, 3)),
        ("crlf.jsonl", JSONL.replace("\n", "\r\n") + "\r\n", (1, 2, 3)),
        ("bom.jsonl", BOM + JSONL.encode(), (1, 2, 3)),
        ("blank.jsonl", "\n" + JSONL.replace("\n", "\n \n\n"), (2, 5, 8)),
        ("lines.json", JSONL, (1, 2, 3)),
        ("a.ndjson", JSONL, (1, 2, 3)),
        ("a.json", json.dumps(ROWS), (1, 1, 1)),
        ("array.jsonl", json.dumps(ROWS), (1, 1, 1)),
        ("bom.json", BOM + json.dumps(ROWS, indent=1).encode(), (2, 6, 10)),
        ("indent.json", json.dumps(ROWS, indent=2), (2, 6, 10)),
        ("data.json", json.dumps({"data": ROWS}), (1, 1, 1)),
        ("data2.json", json.dumps({"version": {"a": [1]}, "data": ROWS}, indent=2), (8, 12, 16)),
        ("data3.json", json.dumps({"version": 1, "data": ROWS}), (1, 1, 1)),
    ],
)
def test_json_in_every_container(write, name, content, lines):
    expected = [(line, *row[1:]) for line, row in zip(lines, EXPECTED, strict=True)]
    assert read(write(name, content)) == expected


def test_csv_keeps_line_numbers(write):
    text = 'prompt,completion\n"a\nb","c ""d"""\n\ne,\n'
    assert read(write("a.csv", text)) == [(2, "a\nb", 'c "d"'), (5, "e", "")]
    assert read(write("b.csv", BOM + text.replace("\n", "\r\n").encode()))[1] == (5, "e", "")
    assert read(write("a.tsv", "question\tanswer\na\tb,c\n")) == [(2, "a", "b,c")]


def test_csv_cell_holds_turns(write):
    cell = json.dumps([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    text = 'messages\n"' + cell.replace('"', '""') + '"\n'
    assert read(write("a.csv", text)) == [(2, "a", "b")]


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    assert read(path) == EXPECTED


@pytest.mark.parametrize(
    ("source", "module", "words"),
    [("a.parquet", "pyarrow", "pyarrow"), ("owner/name", "datasets", "datasets")],
)
def test_missing_extra_names_the_install_line(write, monkeypatch, source, module, words):
    path = write(source, "PAR1") if source.endswith("parquet") else source
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == module:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UnavailableError, match=words) as info:
        read(path)
    assert info.value.exit_code == 69
    assert "pip install 'nibble[data]'" in info.value.fix


def test_hub_id_without_network(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def refuse(*_args, **_kwargs):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UnavailableError, match=r"owner/name.*HF_HUB_OFFLINE"):
        read("owner/name")


def test_hub_rows(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, split: asked.append((name, split)) or ROWS
    )
    assert read("owner/name:test") == EXPECTED
    assert asked == [("owner/name", "test")]


def test_text_is_one_document(write):
    (row,) = read_records(write("a.txt", BOM + b"one\r\n\r\ntwo\n"))
    assert row.is_text
    assert row.messages[0].content == "one\n\ntwo\n"


def test_bad_rows_are_handed_over_and_the_rest_is_read(write):
    lines = JSONL.split("\n")
    content = [lines[0], "{", "[]", '{"text": "x"}', lines[1], '{"a": 1, "a": 2}', lines[2]]
    bad = []
    rows = read(write("a.jsonl", "\n".join(content)), on_bad_row=bad.append)
    assert [row[0] for row in rows] == [1, 5, 7]
    assert [(error.line, error.__notes__[0]) for error in bad] == [
        (2, "bad-json"),
        (3, "not-object"),
        (4, "mixed-formats"),
        (6, "duplicate-key"),
    ]


def test_only_bad_rows_is_not_an_empty_file(write):
    bad = []
    assert read(write("a.jsonl", "{\n{"), on_bad_row=bad.append) == []
    assert len(bad) == 2


@given(st.binary(max_size=200))
def test_any_bytes_give_rows_or_a_data_error(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("fuzz")
    for name in ("a.jsonl", "a.json", "a.csv", "a.txt"):
        path = folder / name
        path.write_bytes(content)
        assert all(error.path == str(path) for error in errors_of(path))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "role",
                    "content",
                    "from",
                    "value",
                    "weight",
                    "tool_calls",
                    "function",
                    "name",
                    "text",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
NAMES = (
    "messages conversations instruction input output prompt completion text tools system history"
)
COLUMNS = st.sampled_from(NAMES.split())


@given(st.dictionaries(COLUMNS, VALUES, max_size=5))
def test_any_row_gives_a_conversation_or_a_data_error(tmp_path_factory, row):
    path = tmp_path_factory.mktemp("fuzz") / "a.jsonl"
    path.write_text(json.dumps(row))
    assert all((error.path, error.line) == (str(path), 1) for error in errors_of(path))
