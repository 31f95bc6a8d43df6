"""Rows that were spoilt at random: each is read or named, none is lost, nothing else happens."""

import json
import random
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nibble.data.chat import tokenize
from nibble.data.records import read_records
from nibble.errors import DataError

ROWS = [
    {"prompt": "Where is order 7?", "completion": "On its way."},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]},
    {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "é 漢"},
                  {"role": "assistant", "content": "", "tool_calls": [{"type": "function",
                   "function": {"name": "f", "arguments": "{\"x\": [1, 2.5, null, true]}"}}]}]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b \U0001f600"}]},
    {"instruction": "Add.", "input": "1 and 2", "output": "3", "history": [["a", "b"]]},
    {"text": "A line.\nAnother, with \"quotes\" and \\ and \t."},
]  # fmt: skip
LINES = [json.dumps(row, ensure_ascii=number % 2 == 0).encode() for number, row in enumerate(ROWS)]
PIECES = [
    *(b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\", b"\\u0000", b"\\ud800", b"\0", b"\xff"),
    *(b"null", b"true", b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b'"role"', b'"content"'),
    *(b"\xef\xbb\xbf", b"\xfe\xff", b"\x1b[2J", b"  ", b"\r", b"\x0b", b"\x85", b"\xe2\x80\xa8"),
    *(b"[" * 200, b'{"a":' * 200, b"<|im_end|>", b'"messages":[]', b'"text":""', b"'"),
]


def _spoil(line, rng):
    """One to four small changes, none of which makes another line."""
    for _ in range(rng.randint(1, 4)):
        start, stop = sorted(rng.choices(range(len(line) + 1), k=2))
        stop = min(stop, start + rng.choice([0, 1, 3, 40]))
        middle = rng.choice(
            [
                b"",
                rng.choice(PIECES),
                line[start:stop][::-1],
                line[start:stop] * 2,
                bytes([rng.randrange(256)]),
                rng.choice(LINES)[start:stop],
            ]
        )
        line = line[:start] + middle + line[stop:]
    return line.replace(b"\n", b" ")


@pytest.mark.torture
@pytest.mark.parametrize("number", range(2))
def test_no_spoilt_row_is_lost(tmp_path, byte_tokenizer, is_torture, number):
    rng, num_rows = random.Random(number), 50_000 if is_torture else 1_500
    path = tmp_path / "rows.jsonl"
    spoilt = [LINES[0], *(_spoil(rng.choice(LINES), rng) for _ in range(num_rows))]
    path.write_bytes(b"\n".join(spoilt) + b"\n")
    expected = [line for line, row in enumerate(spoilt, 1) if row.strip(b" \t\r\n")]
    bad = []
    read = list(read_records(path, on_bad_row=bad.append))
    assert sorted([*(row.line for row in read), *(error.line for error in bad)]) == expected
    for error in bad:
        assert type(error) is DataError
        assert (error.path, error.exit_code) == (str(path), 65)
        assert error.reason
        assert error.fix
    for row in read[:: 20 if is_torture else 5]:
        with suppress(DataError):
            tokenize(row, byte_tokenizer)
    print(f"spoilt rows: {num_rows:,}, of which {len(bad):,} named and the others read")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("any")


def _read_any(path):
    """Read a file whatever is in it; only its own errors may come."""
    bad = []
    try:
        read = list(read_records(path, on_bad_row=bad.append))
    except DataError as error:
        bad, read = [*bad, error], []
    for error in bad:
        assert type(error) is DataError
        assert error.reason
        assert error.fix
        assert 0 <= error.line <= path.read_bytes().count(b"\n") + 1 or path.suffix == ".csv"
    return read, bad


_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "type", "text", "x"]), inner
        )
    ),
    max_leaves=8,
)
_COLUMNS = (
    *("messages", "conversations", "prompt", "completion", "instruction", "input", "output"),
    *("text", "system", "tools", "history", "question", "answer", "chosen", "rejected", "id"),
)
_ROW = st.dictionaries(st.sampled_from(_COLUMNS), _VALUE, max_size=4)


@pytest.mark.torture
@given(
    lines=st.lists(st.binary(max_size=40) | _ROW.map(lambda r: json.dumps(r).encode()), max_size=4)
)
def test_any_json_lines(folder, lines):
    path = folder / "rows.jsonl"
    path.write_bytes(b"\n".join(lines))
    _read_any(path)


_CELL = st.text(st.characters(codec="utf-8"), max_size=6) | st.sampled_from(
    ['"', '""', '"a', "\n", "\r\n", ",", ";", "\t", '[{"role": "user"}]', '"a\nb"', "\0", "\ufeff"]
)


@pytest.mark.torture
@given(
    header=st.lists(st.sampled_from([*_COLUMNS, "", '"', "a;b"]), max_size=4),
    rows=st.lists(st.lists(_CELL, max_size=5), max_size=5),
    delimiter=st.sampled_from([",", ";", "\t"]),
    noise=st.binary(max_size=6),
)
def test_any_csv(folder, header, rows, delimiter, noise):
    lines = [delimiter.join(cells) for cells in [header, *rows]]
    path = folder / "rows.csv"
    path.write_bytes("\n".join(lines).encode() + noise)
    _read_any(path)
