"""Rows with choices: the field names of known sets, and every way in which a row can be wrong."""

import json

import pytest

from nibble.data.choice import read_questions
from nibble.errors import DataError

GOOD = {"question": "q", "choices": ["a", "b", "c"], "answer": 1}


def read(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(read_questions(str(path)))


@pytest.mark.parametrize(
    ("row", "right"),
    [
        (GOOD, 1),
        ({**GOOD, "answer": "C"}, 2),
        ({**GOOD, "answer": "b"}, 1),
        ({**GOOD, "answer": "0"}, 0),
        ({**GOOD, "choices": ["1", "2", "0"], "answer": "0"}, 2),
        ({"question": "q", "choices": {"text": ["x", "y"], "label": ["1", "2"]},
          "answerKey": "2"}, 1),
        ({"ctx": "q", "endings": ["x", "y"], "label": "1"}, 1),
        ({"messages": [{"role": "user", "content": "q"}], "choices": ["x", "y"], "answer": 0}, 0),
        ({"question": "q", "options": ["x", "y"], "answer": "B", "answer_index": 1}, 1),
    ],
)  # fmt: skip
def test_known_field_names(tmp_path, row, right):
    (found,) = read(tmp_path, row)
    assert (found.messages[-1].content, found.right, found.line) == ("q", right, 1)


def test_a_passage_stands_before_its_question(tmp_path):
    (found,) = read(tmp_path, {**GOOD, "passage": "p"})
    assert found.messages[0].content == "p\n\nq"


BAD = {
    "no-choices": {"question": "q", "answer": "a"},
    "few-choices": {**GOOD, "choices": ["a"]},
    "label-count": {**GOOD, "choices": {"text": ["a", "b"], "label": ["A"]}},
    "wrong-choice": {**GOOD, "answer": 3},
    "wrong-type": {**GOOD, "choices": "a, b"},
    "null-field": {**GOOD, "choices": ["a", None]},
    "empty-field": {**GOOD, "question": ""},
    "ambiguous-columns": {**GOOD, "prompt": "p"},
    "empty-row": {},
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_named_with_its_line(tmp_path, name):
    with pytest.raises(DataError, match=r"rows\.jsonl:2: ") as info:
        read(tmp_path, GOOD, BAD[name])
    assert info.value.__notes__ == [name]
    assert info.value.fix


@pytest.mark.parametrize("answer", ["z", "", -1, True, None, "a"])
def test_an_answer_that_names_none_or_several(tmp_path, answer):
    with pytest.raises(DataError, match="names none"):
        read(tmp_path, {**GOOD, "choices": ["a", "a", "b"], "answer": answer})


def test_reading_goes_on_behind_a_bad_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("3\n" + json.dumps(GOOD) + "\n{\n" + json.dumps(GOOD) + "\n")
    bad = []
    assert [q.line for q in read_questions(str(path), on_bad_row=bad.append)] == [2, 4]
    assert [error.line for error in bad] == [1, 3]
