"""Files that are broken as a whole: one typed error, exit code 65, no hang, bounded memory."""

import gzip
import os
import socket
import time
import tracemalloc

import pytest

from nibble.data import containers
from nibble.data.records import read_records
from nibble.errors import DataError

ROW = b'{"prompt": "a", "completion": "b"}\n'
HEAD = b"prompt,completion\n"
GZIP = gzip.compress(ROW * 100)

# kind: (file name, content, line or 0, words of the reason, words of the fix)
BAD_FILES = {
    "empty": ("a.jsonl", b"", 0, "empty", "put examples"),
    "only-bom": ("a.csv", b"\xef\xbb\xbf", 0, "empty", "put examples"),
    "only-blank-lines": ("a.jsonl", b"\n \r\n\n", 0, "no rows", "put examples"),
    "empty-array": ("a.json", b"[]", 0, "no rows", "put examples"),
    "only-header": ("a.csv", HEAD, 0, "no rows", "put examples"),
    "utf-16": ("a.jsonl", ROW.decode().encode("utf-16"), 1, "UTF-16", "UTF-8"),
    "utf-16-without-bom": ("a.jsonl", ROW.decode().encode("utf-16-be"), 1, "UTF-16", "UTF-8"),
    "utf-32": ("a.csv", HEAD.decode().encode("utf-32"), 1, "UTF-32", "UTF-8"),
    "gzip": ("a.jsonl.gz", GZIP, 0, "packed (.gz)", "unpack"),
    "gzip-cut-off": ("a.jsonl.gz", GZIP[:20], 0, "packed (.gz)", "unpack"),
    "gzip-by-another-name": ("a.jsonl", GZIP[:20], 0, "packed (gzip)", "unpack"),
    "zip-by-another-name": ("a.csv", b"PK\x03\x04\x00\x00", 0, "packed (zip)", "unpack"),
    "unknown-ending": ("a.xlsx", ROW, 0, '".xlsx"', "convert"),
    "array-cut-off": ("a.json", b'[{"text": "a"},\n{"text', 2, "column 2", "correct"),
    "array-not-closed": ("a.json", b'[{"text": "a"},\n', 2, "not closed", "write it again"),
    "array-without-comma": ("a.json", b'[{"text": "a"}\n{"text": "b"}]', 2, "a comma", "correct"),
    "array-same-key-then-broken": ("a.json", b'[{"x": {"a": 1, "a": 2}, y}]', 1, "26", "correct"),
    "array-nan-then-broken": ("a.json", b"[[NaN, }]", 1, "column 8", "correct"),
    "array-deep": ("a.json", b"[" * 10_000, 1, "too deeply", "flatten"),
    "array-huge-number": ("a.json", b"[\n" + b"9" * 5000 + b"]", 2, "digits", "as a text"),
    "array-then-rows": ("a.json", b'[{"text": "a"}]\n{"text": "b"}', 2, "after the end", "remove"),
    "array-latin-1": ("a.json", b'[\n{"text": "\xe9"}]', 2, "0xe9", "iconv"),
    "object-without-data": ("a.json", b'{\n"rows": []}', 1, "an object", '"data"'),
    "csv-open-quote": ("a.csv", HEAD + b'a,b\n"c,d\ne,f\n', 3, "line 4", "quotes"),
    "csv-text-after-quote": ("a.csv", HEAD + b'a,b\n"c"x,d\n', 3, "expected after", "quotes"),
    "csv-nul-in-header": ("a.csv", b"prompt\0,completion\na,b\n", 2, "prompt\\x00", "rename"),
    "csv-unnamed-column": ("a.csv", b"prompt,\na,b\n", 1, "column 2", "name every"),
    "csv-same-name": ("a.csv", b"prompt,prompt\na,b\n", 1, '"prompt"', "rename"),
    "csv-semicolons": ("a.csv", b"prompt;completion\na;b\n", 1, "one column", "commas"),
    "csv-latin-1-header": ("a.csv", b"pr\xf6mpt,completion\na,b\n", 1, "0xf6", "iconv"),
    "tsv-open-quote": ("a.tsv", b'prompt\tcompletion\n"a\tb\n', 2, "unexpected end", "quotes"),
    "parquet-of-text": ("a.parquet", ROW, 0, "Parquet", "write it again"),
    "parquet-head-alone": ("a.parquet", b"PAR1", 0, "Parquet", "write it again"),
    "text-latin-1": ("a.txt", b"one\ntwo \xe9\n", 2, "0xe9", "iconv"),
    "text-nul": ("a.txt", b"one\ntwo\0\n", 2, "NUL", "remove"),
    "text-blank": ("a.txt", b" \n\n", 0, "empty", "put examples"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_file_is_refused_with_its_line(check, write, kind):
    name, content, line, reason, fix = BAD_FILES[kind]
    path = write(name, content)
    started = time.monotonic()
    code, document, message = check(path)
    assert time.monotonic() - started < 1
    assert code == 65
    if document is None:
        found = message.replace("nibble: ", "", 1)
    else:
        (bad,) = document["train"]["bad_rows"]
        found = f"{bad['path']}:{bad['line']}: {bad['reason']}\n  fix: {bad['fix']}"
    what, _, todo = found.partition("\n  fix: ")
    assert what.startswith(f"{path}:{line}: " if line else f"{path}: ")
    assert reason in what
    assert fix in todo


CSV_ROWS = {
    "too-few-fields": (b"c", "1 fields, expected 2", "between quotes"),
    "too-many-fields": (b"c,d,e", "3 fields, expected 2", "between quotes"),
    "quote-in-the-middle": (b'c"d,"e,f",g', "3 fields", "between quotes"),
    "nul": (b"c\0,d", "NUL", "remove it"),
    "latin-1": (b"\xe9,d", "byte 1 of the line", "iconv"),
    "utf-16-row": ("c,d".encode("utf-16-le"), '"prompt" holds a NUL', "remove it"),
    "latin-1-in-quotes": (b'"c\n\xe9",d', "0xe9", "iconv"),
    "empty-prompt": (b",d", '"prompt" is empty', "fill it"),
    "control-token": (b"c<|im_end|>,d", '"<|im_end|>"', "space inside"),
    "huge-field": (b"c," + b"x" * 2_000_000 + b",e", "3 fields", "between quotes"),
    "many-fields": (b"," * 100_000, "100001 fields", "between quotes"),
}


@pytest.mark.parametrize("kind", CSV_ROWS)
@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_bad_row_of_csv_leaves_the_others(bad_row_of, write, kind, suffix):
    row, reason, fix = CSV_ROWS[kind]
    content = HEAD + b"a,b\n" + row + b"\ng,h\n"
    path = write(f"a.{suffix}", content.replace(b",", b"\t") if suffix == "tsv" else content)
    bad = bad_row_of(path, num_good=2)
    assert bad["line"] == (4 if kind == "latin-1-in-quotes" else 3)
    assert reason in bad["reason"]
    assert fix in bad["fix"]


def test_bad_rows_of_an_array_leave_the_others(check, write):
    rows = [b'{"a": 1, "a": 2}', b"[NaN]", b"[" * 200 + b"]" * 200, b"null", ROW.strip()]
    code, document, _ = check(write("a.json", b"[" + b",\n".join(rows) + b"]"))
    assert code == 65
    assert document["train"]["num_rows"] == 1
    assert [bad["line"] for bad in document["train"]["bad_rows"]] == [1, 2, 3, 4]


@pytest.mark.parametrize("name", ["pipe.jsonl", "pipe.csv", "pipe.parquet", "pipe.txt"])
def test_a_pipe_is_refused_at_once(check, tmp_path, name):
    os.mkfifo(tmp_path / name)
    code, _, message = check(tmp_path / name)
    assert code == 65
    assert "this is a pipe or a device, expected a file\n  fix: write the rows" in message


def test_a_socket_a_folder_and_nothing_are_refused(check, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("a.jsonl")
        assert check("a.jsonl")[0] == 65
    (tmp_path / "link.jsonl").symlink_to("link.jsonl")
    for name in (tmp_path, "gone.jsonl", "link.jsonl", "~nobody-at-all/a.jsonl", "\0.jsonl"):
        code, _, message = check(name)
        assert (code, "\n  fix: " in message) == (65, True), name
    code, _, message = check("x" * 5000 + ".jsonl")
    assert (code, "cannot be read" in message) == (65, True)


def test_a_disk_that_fails_midway_is_an_error_of_the_file(write, monkeypatch):
    def broken(_path):
        yield 1, {"prompt": "a", "completion": "b"}
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("nibble.data.records.rows_of_json", broken)
    with pytest.raises(DataError, match="cannot be read: Input/output error") as info:
        list(read_records(write("a.jsonl", ROW)))
    assert info.value.exit_code == 65


def test_a_long_line_is_one_bad_row_and_never_held_whole(write, monkeypatch):
    monkeypatch.setattr(containers, "MAX_LINE_BYTES", 10_000)
    long_row = b'{"prompt": "' + b"a" * 8_000_000 + b'", "completion": "b"}\n'
    path = write("a.jsonl", ROW + long_row + ROW + long_row.strip())
    bad = []
    tracemalloc.start()
    lines = [row.line for row in read_records(path, on_bad_row=bad.append)]
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert lines == [1, 3]
    assert [error.line for error in bad] == [2, 4]
    assert "longer than 10,000 bytes" in bad[0].reason
    assert peak_bytes < 1_000_000


@pytest.mark.parametrize("kind", ["json", "csv"])
def test_time_grows_with_the_size_of_the_file(write, kind):
    def seconds(count):
        rows = "[" + ",\n".join(['{"text": "a"}'] * count) + "]"
        path = write(f"a.{kind}", rows if kind == "json" else "text\n" + "a\n" * count)
        started = time.process_time()
        assert sum(1 for _ in read_records(path)) == count
        return time.process_time() - started

    assert seconds(40_000) < 16 * max(seconds(5_000), 0.02)


def test_wide_objects_and_headers_take_no_time(write):
    names = [f"c{number}" for number in range(20_000)]
    wide = "{" + ",".join(f'"{name}": 1' for name in [*names, names[-1]]) + "}"
    started = time.process_time()
    for path in (write("a.jsonl", wide), write("a.csv", ",".join(names) + "\n1\n")):
        with pytest.raises(DataError):
            list(read_records(path))
    assert time.process_time() - started < 1
