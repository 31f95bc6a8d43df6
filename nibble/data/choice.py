"""Multiple-choice rows: a question, its choices, and which one is right.

    MMLU         {"question", "choices": [...], "answer": 2}
    ARC          {"question", "choices": {"text": [...], "label": ["A", ...]}, "answerKey": "C"}
    HellaSwag    {"ctx", "endings": [...], "label": "2"}
    own          {"prompt" or "messages", "choices": [...], "answer": number from 0, label or text}

Other columns are allowed and unused.
"""

import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nibble.data.formats import PROMPTS
from nibble.data.records import read_rows
from nibble.data.turns import Message, Place, clean, kind, parse_cell, read_turns
from nibble.errors import DataError

QUESTIONS = ("messages", *PROMPTS, "question_stem", "ctx")
CONTEXTS = ("context", "passage", "article")
CHOICES = ("choices", "options", "endings")
ANSWERS = ("answerKey", "answer_index", "label", "gold", "answer")


@dataclass(frozen=True, slots=True)
class Question:
    """A row: the turns up to the question, the choices, the number of the right one from 0."""

    messages: tuple[Message, ...]
    choices: tuple[str, ...]
    right: int
    path: str
    line: int


def read_questions(
    source: str, *, on_bad_row: Callable[[DataError], None] | None = None
) -> Iterator[Question]:
    """The questions of one file or hub data set, in order.

    Args:
        source: As `read_records` takes it.
        on_bad_row: Gets the error of each bad row, and reading goes on; without it the first bad
            row is raised.

    Raises:
        DataError: A bad file or row.
    """
    for place, row in read_rows(source, on_bad_row=on_bad_row):
        try:
            question = row_to_question(row, place)
        except DataError as error:
            if on_bad_row is None:
                raise
            on_bad_row(error)
            continue
        yield question


def row_to_question(row: Mapping[str, Any], place: Place) -> Question:
    """Check one row and bring it into the common shape.

    Raises:
        DataError: With path, line, reason and fix.
    """
    asked = [name for name in QUESTIONS if name in row]
    if len(asked) > 1:
        raise place.fault("ambiguous-columns", what="question", columns=", ".join(asked))
    offered = next((name for name in CHOICES if name in row), None)
    answered = next((name for name in ANSWERS if name in row), None)
    if not asked or offered is None or answered is None:
        raise place.fault("no-choices", columns=", ".join(map(str, row)))
    choices, labels = _choices(row[offered], offered, place)
    right = _right(row[answered], choices, labels)
    if right is None:
        raise place.fault(
            "wrong-choice", field=answered, found=str(row[answered]), num_choices=len(choices)
        )
    return Question(tuple(_messages(row, asked[0], place)), choices, right, place.path, place.line)


def _messages(row: Mapping[str, Any], name: str, place: Place) -> list[Message]:
    if name == "messages":
        return read_turns(row[name], name, place)
    parts = [_text(row[key], key, place) for key in (*CONTEXTS, name) if row.get(key)]
    if not row.get(name):
        raise place.fault("empty-field", field=name)
    messages = [Message("user", "\n\n".join(parts))]
    if row.get("system"):
        messages.insert(0, Message("system", _text(row["system"], "system", place)))
    return messages


def _choices(value: object, name: str, place: Place) -> tuple[tuple[str, ...], list[str]]:
    """The texts, and the labels by which an answer may name them."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):  # a cell of a CSV
        value = parse_cell(value, name, place)
    labels: object = []
    if isinstance(value, Mapping):
        value, labels = value.get("text"), value.get("label") or []
    if not isinstance(value, list) or not isinstance(labels, list):
        raise place.fault("wrong-type", field=name, found=kind(value), expected="a list of texts")
    texts = tuple(_text(each, f"{name} {number}", place) for number, each in enumerate(value))
    if len(texts) < 2:
        raise place.fault("few-choices", field=name, found=len(texts))
    if labels and len(labels) != len(texts):
        raise place.fault("label-count", num_labels=len(labels), num_choices=len(texts))
    return texts, [str(label) for label in labels]


def _right(answer: object, choices: Sequence[str], labels: Sequence[str]) -> int | None:
    """The number of the choice that an answer names; None where it names none, or several.

    A whole number counts from 0. A text is a label, the text of a choice, a letter from A, or a
    number from 0: the first of these that it can be.
    """
    number: int | None = None
    if isinstance(answer, int) and not isinstance(answer, bool):
        number = answer
    elif isinstance(answer, str):
        text = answer.strip()
        for names in (labels, [choice.strip() for choice in choices], string.ascii_uppercase):
            if text and text in names:
                number = list(names).index(text) if list(names).count(text) == 1 else None
                break
        else:
            number = int(text) if text.isascii() and text.isdigit() and len(text) < 9 else None
    return number if number is not None and 0 <= number < len(choices) else None


def _text(value: object, name: str, place: Place) -> str:
    if value is None:
        raise place.fault("null-field", field=name)
    if not isinstance(value, str):
        raise place.fault("wrong-type", field=name, found=kind(value), expected="a text")
    if not value.strip():
        raise place.fault("empty-field", field=name)
    return clean(value, f'"{name}"', place)
