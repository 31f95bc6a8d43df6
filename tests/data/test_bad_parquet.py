"""Parquet that is broken, cut off or of other types: refused, or one bad row each."""

import datetime
import decimal

import pytest

pyarrow = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402

ANSWER = {"role": "assistant", "content": "b"}
TURNS = [{"role": "user", "content": "a"}, ANSWER]
WHEN = datetime.date(2020, 1, 1)


@pytest.fixture
def write_table(tmp_path):
    """write_table(table) gives the path of its Parquet file."""

    def write(table):
        parquet.write_table(table, tmp_path / "a.parquet")
        return tmp_path / "a.parquet"

    return write


def _calls(value):
    return {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": value}]}


ROWS = {
    "number": ({"prompt": 1, "completion": "b"}, "a number, expected a text"),
    "bytes": ({"prompt": b"a", "completion": "b"}, "bytes, expected a text"),
    "date": ({"text": WHEN}, "date, expected a text"),
    "null": ({"prompt": None, "completion": "b"}, "is null"),
    "list": ({"prompt": ["a"], "completion": "b"}, "a list, expected a text"),
    "struct": ({"messages": {"role": "user"}}, "an object, expected a list"),
    "turns-of-text": ({"messages": ["a"]}, "turn 1 is a text"),
    "decimal-weight": ({"messages": [*TURNS, ANSWER | {"weight": decimal.Decimal(1)}]}, "weight 1"),
    "date-argument": ({"messages": [*TURNS, _calls({"d": WHEN})]}, "a value of type date"),
    "bytes-argument": ({"messages": [*TURNS, _calls({"d": b"x"})]}, "a value of type bytes"),
    "nan-argument": ({"messages": [*TURNS, _calls({"d": float("nan")})]}, "not finite"),
    "date-in-tools": ({"messages": TURNS, "tools": [{"name": WHEN}]}, "a value of type date"),
}


@pytest.mark.parametrize("kind", ROWS)
def test_other_types_are_bad_rows(check, write_table, kind):
    row, reason = ROWS[kind]
    code, document, _ = check(write_table(pyarrow.Table.from_pylist([row])))
    assert code == 65
    (bad,) = document["train"]["bad_rows"]
    assert bad["line"] == 1
    assert reason in bad["reason"]
    assert bad["fix"]


@pytest.mark.parametrize("kind", ["bad-utf8", "date-of-no-year"])
def test_a_value_that_python_has_not_is_one_bad_row(check, write_table, kind):
    names, texts = ["prompt", "completion"], pyarrow.array(["b"] * 2000)
    if kind == "bad-utf8":
        raw = pyarrow.array([b"a"] * 1500 + [b"\xff"] + [b"a"] * 499)
        buffers = raw.buffers()
        prompts = pyarrow.StringArray.from_buffers(2000, buffers[1], buffers[2])
        table = pyarrow.table([prompts, texts], names)
    else:
        days = pyarrow.array([0] * 1500 + [2**30] + [0] * 499, pyarrow.int32())
        table = pyarrow.table([texts, texts, days.cast(pyarrow.date32())], [*names, "day"])
    code, document, _ = check(write_table(table))
    assert code == 65
    assert document["train"]["num_rows"] == 1999
    (bad,) = document["train"]["bad_rows"]
    assert (bad["line"], bad["fix"]) == (1501, "correct it or remove the row")
    assert "a value of the row cannot be read" in bad["reason"]


def test_two_columns_of_one_name_are_refused(check, write_table):
    table = pyarrow.table([["a"], ["b"], ["c"]], ["prompt", "completion", "completion"])
    code, _, message = check(write_table(table))
    assert code == 65
    assert 'two columns are called "completion"\n  fix: rename one' in message


def test_no_rows_and_no_columns(check, write_table):
    empty = pyarrow.table([pyarrow.array([], pyarrow.string())], ["text"])
    code, _, message = check(write_table(empty))
    assert (code, "no rows" in message) == (65, True)
    code, document, _ = check(write_table(pyarrow.table([["a"]], ["x"])))
    assert code == 65
    assert "no known format has the columns x" in document["train"]["bad_rows"][0]["reason"]


def test_cut_off_at_any_place_is_refused(check, write_table, tmp_path):
    content = write_table(pyarrow.Table.from_pylist([{"text": f"row {i}"} for i in range(50)]))
    whole = content.read_bytes()
    for size in range(1, len(whole), max(1, len(whole) // 40)):
        path = tmp_path / "cut.parquet"
        path.write_bytes(whole[:size])
        code, _, message = check(path)
        assert (code, "not a Parquet file that can be read" in message) == (65, True), size


def test_a_flipped_byte_is_data_or_an_error_of_the_file(check, write_table, tmp_path):
    content = write_table(pyarrow.Table.from_pylist([{"text": f"row {i}"} for i in range(50)]))
    whole = content.read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 100)):
        path = tmp_path / "flipped.parquet"
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        code, _, message = check(path)
        assert code in (0, 65), (place, message)
