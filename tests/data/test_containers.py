"""Arrays of JSON are read element by element, each at its line. Faults are in test_faults.py."""

import json

from hypothesis import given
from hypothesis import strategies as st

from nibble.data.containers import rows_of_csv, rows_of_json

ROWS = st.lists(
    st.dictionaries(st.text(max_size=4), st.text(max_size=8) | st.integers(), max_size=3),
    max_size=5,
)


@given(ROWS, st.sampled_from([None, 0, 2]), st.booleans())
def test_arrays_round_trip_with_lines(tmp_path_factory, rows, indent, is_wrapped):
    path = tmp_path_factory.mktemp("json") / "a.json"
    text = json.dumps({"n": 1, "data": rows} if is_wrapped else rows, indent=indent)
    path.write_text(text)
    found = list(rows_of_json(path))
    assert [row for _, row in found] == rows
    lines = text.split("\n")
    assert all(lines[line - 1].lstrip()[:1] in "{[" for line, _ in found)


@given(ROWS)
def test_lines_round_trip(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("json") / "a.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    assert list(rows_of_json(path)) == list(enumerate(rows, start=1))


def test_long_csv_field(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text\n" + "x" * 300_000 + "\n")
    assert [len(row["text"]) for _, row in rows_of_csv(path)] == [300_000]
