"""Rows changed at random and rows made at random: each is read or reported, never both or none."""

import json
import random
import time
from collections import Counter

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nibble.config import DataConfig
from nibble.data.dataset import read_source
from nibble.errors import DataError

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "1 + 1?"}]},
    {"role": "assistant", "content": "", "tool_calls": [{"name": "add", "arguments": {"a": [1]}}]},
    {"role": "tool", "content": "2", "name": "add"},
    {"role": "assistant", "content": "2 \U0001f642", "weight": 1},
]
SHAREGPT = [{"from": "human", "value": "Grüß dich"}, {"from": "gpt", "value": "Hi"}]
GOOD = {
    "messages": {"messages": TURNS, "tools": [{"name": "add", "parameters": {}}]},
    "sharegpt": {"conversations": SHAREGPT, "system": "s", "id": 7},
    "alpaca": {"instruction": "a", "input": "b", "output": "c", "history": [["d", "e"]]},
    "prompt-completion": {"prompt": "What is 7 x 6?", "completion": "42", "score": 0.5},
    "text": {"text": "Once upon a time\tthere was a row."},
}
STRANGE = [None, True, -1, 0.5, 1e999, 10**30, "", " ", "\0", "\ud800", "<|im_end|>", [], {}, [[]]]
PIECES = ['"', "{", "}", "[", "]", ":", ",", "\\", "\\u", "\0", "é", "NaN", "1e999", "null", "\t"]


@pytest.fixture(scope="module")
def read(golden, tmp_path_factory):
    """read(name, content) gives what stands in such a file, bad rows collected."""
    tokenizer = golden.byte_tokenizer()
    tokenizer.chat_template = golden.CHATML
    folder = tmp_path_factory.mktemp("rows")

    def build(name, content):
        path = folder / name
        path.write_bytes(content)
        found = read_source(str(path), tokenizer, DataConfig(on_bad_row="skip"))
        assert all(is_clear(error, path) for error in found.bad_rows)
        return found

    return build


def is_clear(error, path):
    """Whether an error says where, what and what to do, in words that can be printed."""
    words = error.reason + error.fix
    return (
        type(error) is DataError
        and error.exit_code == 65
        and error.path == str(path)
        and error.line >= 1
        and bool(error.reason and error.fix)
        and words.isprintable()
        and len(words) < 2000
    )


def lines_of(found):
    """How often each line was read or reported."""
    return Counter([e.line for e in found.examples] + [e.line for e in found.bad_rows])


def mutated(row, chance):
    """The row with one or two changes, to its values or to its bytes."""
    row = json.loads(json.dumps(row))
    if chance.random() < 0.5:
        change_a_value(row, chance)
        return json.dumps(row, ensure_ascii=chance.random() < 0.5).encode("utf-8", "surrogatepass")
    raw = bytearray(json.dumps(row, ensure_ascii=False).encode())
    for _ in range(chance.randint(1, 2)):
        change_bytes(raw, chance)
    return bytes(raw.replace(b"\n", b" "))


def change_a_value(part, chance):
    """Put something strange at a random place of an object or list, or take the place away."""
    keys = list(part) if isinstance(part, dict) else range(len(part))
    key = chance.choice(keys)
    if isinstance(part[key], dict | list) and part[key] and chance.random() < 0.8:
        change_a_value(part[key], chance)
    elif isinstance(part, dict) and chance.random() < 0.3:
        part[chance.choice([key + "s", key.upper(), "\x1b"])] = part.pop(key)
    elif chance.random() < 0.2:
        del part[key]
    else:
        part[key] = chance.choice(STRANGE)


def change_bytes(raw, chance):
    """Cut out, cut off, double, flip or put in."""
    start = chance.randrange(len(raw))
    stop = start + chance.randint(1, 8)
    piece = bytes([chance.randrange(256)]), chance.choice(PIECES).encode()
    changes = (b"", bytes(raw[start:stop]) * 2, *piece, piece[1] + raw[start:stop])
    raw[start:stop] = chance.choice(changes)
    if chance.random() < 0.1:
        del raw[start:]
    raw[:0] = b"" if raw else b"{"


@pytest.mark.torture
@pytest.mark.parametrize("format", GOOD)
def test_every_mutated_row_is_read_or_reported(read, is_torture, format):
    chance = random.Random(format)
    count = 20_000 if is_torture else 600
    rows = [json.dumps(GOOD[format]).encode()]
    rows += [mutated(GOOD[format], chance) for _ in range(count)]
    started = time.monotonic()
    found = read("train.jsonl", b"\n".join(rows))
    seconds = time.monotonic() - started
    numbers = [line for line, row in enumerate(rows, start=1) if row.strip(b" \t\r\n")]
    assert lines_of(found) == Counter(numbers)
    assert found.bad_rows
    assert len(found.examples) > 1
    kinds = {error.__notes__[0] for error in found.bad_rows}
    print(
        f"{format}: {count:,} mutated rows, {len(found.examples) - 1:,} still good, "
        f"{len(found.bad_rows):,} reported as {len(kinds)} kinds, {seconds:.1f} s"
    )


@pytest.mark.torture
def test_every_mutated_row_of_csv_is_read_or_reported(read, is_torture):
    chance = random.Random("csv")
    count = 20_000 if is_torture else 600
    rows = []
    for _ in range(count):
        row = bytearray(b"What is 7 x 6?,42")
        change_bytes(row, chance)
        rows.append(bytes(row).translate(None, b'"\r\n') or b"x")
    found = read("train.csv", b"prompt,completion\n" + b"\n".join(rows))
    assert lines_of(found) == Counter(range(2, count + 2))
    num_read, num_reported = len(found.examples), len(found.bad_rows)
    assert num_read
    assert num_reported
    print(f"csv: {count:,} mutated rows, {num_read:,} still good, {num_reported:,} reported")


TURN_KEYS = "role content from value weight tool_calls function name arguments text type"
NAMES = "messages conversations instruction input output prompt completion text tools history"
VALUES = st.recursive(
    st.sampled_from(STRANGE) | st.text(max_size=8) | st.integers() | st.floats(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(TURN_KEYS.split()), inner, max_size=4)
    ),
    max_leaves=12,
)
TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool", "x"]), "content": VALUES},
    optional={key: VALUES for key in ("weight", "tool_calls", "name", "reasoning_content")},
)
COLUMNS = st.sampled_from(NAMES.split())
ROW = (
    st.dictionaries(COLUMNS, VALUES, max_size=4)
    | st.fixed_dictionaries({"messages": st.lists(TURN, max_size=4)}, optional={"tools": VALUES})
).map(lambda row: json.dumps(row).encode())
BROKEN = st.tuples(st.sampled_from(list(GOOD.values())), st.randoms(use_true_random=False)).map(
    lambda pair: mutated(*pair)
)
PUZZLE = st.lists(st.sampled_from(PIECES)).map(lambda pieces: "".join(pieces).encode())


@pytest.mark.torture
@given(ROW | BROKEN | st.binary(max_size=60) | PUZZLE)
def test_any_jsonl_row_is_read_or_reported(read, row):
    row = row.replace(b"\n", b" ")
    first = json.dumps(GOOD["messages"]).encode()
    found = read("train.jsonl", first + b"\n" + row)
    assert lines_of(found) == Counter([1, 2] if row.strip(b" \t\r\n") else [1])


CELL = st.text(st.sampled_from('ab",;\t\r\n\0é \ufeff\\<'), max_size=6)
HEADS = [b"prompt,completion\n", b"messages\n", b""]
TABLE = st.lists(st.lists(CELL, max_size=4).map(",".join), max_size=6).map("\n".join)


@pytest.mark.torture
@given(TABLE.map(str.encode) | st.binary(max_size=60), st.sampled_from(HEADS))
@example(b'"', HEADS[0])
@example(b'"a\n\xff",b\nc,d', HEADS[0])
def test_any_csv_is_read_reported_or_refused(read, content, head):
    try:
        found, refusal = read("train.csv", head + content), None
    except DataError as error:
        found, refusal = None, error
    if refusal is not None:
        assert refusal.exit_code == 65
        assert refusal.reason
        assert refusal.fix
    else:
        assert found.num_read
        assert set(lines_of(found).values()) == {1}
