"""What a model gets right: exact match and multiple choice over a data file.

Each gives the figures of `nibble eval`, and a row of predictions for every row of the data.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from nibble.config import DataConfig
from nibble.data.choice import Question, read_questions
from nibble.data.faults import fault
from nibble.data.records import read_records
from nibble.errors import DataError, UsageError
from nibble.experiment.statistics import proportion
from nibble.serve.answers import Form, Told, exact_matches, read_prompts
from nibble.serve.choices import Candidate, Scored, encode_choices, loglikelihoods

# Gets the number of rows that there are, and gives what is told how many more are done.
Bar = Callable[[int], Callable[[int], None]]


@dataclass(frozen=True)
class Outcome:
    """Figures for a person or a program, a row for each row of the data, and the bad rows."""

    values: dict[str, Any]
    predictions: list[dict[str, Any]]
    bad_rows: list[DataError]


@dataclass(frozen=True)
class Rows:
    """Which rows are measured.

    Args:
        data: Names the file in `train`, its format, and whether a bad row stops.
        limit: The first so many; None is all.
    """

    data: DataConfig
    limit: int | None = None
    bad: list[DataError] = field(default_factory=list)

    @property
    def source(self) -> str:
        """The file.

        Raises:
            UsageError: If there are several.
        """
        if isinstance(self.data.train, str) and self.data.train:
            return self.data.train
        raise UsageError("a task is measured on one file", fix="give --data FILE")

    @property
    def on_bad_row(self) -> Callable[[DataError], None] | None:
        """Where errors of bad rows go; None where the first one stops."""
        return None if self.data.on_bad_row == "stop" else self.bad.append


def exact_match(
    model: Any, tokenizer: Any, rows: Rows, form: Form, *, max_new_tokens: int, whole: bool,
    bar: Bar,
) -> Outcome:  # fmt: skip
    """The share of rows whose greedy answer is the one in the data.

    Args:
        whole: Write every answer to its end, also where it can no longer match.

    Raises:
        DataError: A bad row that stops, or no usable row.
    """
    records = read_records(rows.source, format=rows.data.format, on_bad_row=rows.on_bad_row)
    chosen = islice(records, rows.limit)
    prompts = list(read_prompts(chosen, tokenizer, form, on_bad_row=rows.on_bad_row))
    _refuse_nothing(prompts, rows)
    told = exact_matches(
        model,
        tokenizer,
        prompts,
        form,
        max_new_tokens=max_new_tokens,
        whole=whole,
        on_done=bar(len(prompts)),
    )
    num_exact = sum(each.is_exact for each in told)
    values = {
        "task": "exact-match",
        "exact_match": _share(num_exact, len(told)),
        "num_exact": num_exact,
        "num_rows": len(told),
        "num_too_long": sum(each.text is None for each in told),
        "num_bad": len(rows.bad),
    }
    return Outcome(values, [_told_to_row(each) for each in told], rows.bad)


def multiple_choice(model: Any, tokenizer: Any, rows: Rows, *, plain: bool, bar: Bar) -> Outcome:
    """The share of questions whose right choice is the likeliest one, summed and by length.

    Args:
        plain: Without the chat template; so it is too where the model has none.

    Raises:
        DataError: A bad row that stops, or no usable row.
    """
    is_plain = plain or not tokenizer.chat_template
    context = getattr(model.config, "max_position_embeddings", None)
    asked = list(_candidates(rows, tokenizer, is_plain))
    _refuse_nothing(asked, rows)
    fitting = [pair for pair in asked if _fits(pair[1], context)]
    sums = loglikelihoods(model, [each for _, each in fitting], on_done=bar(len(fitting)))
    scored = [Scored(pair[0], each) for pair, each in zip(fitting, sums, strict=True)]
    num_right = sum(each.chosen == each.question.right for each in scored)
    num_right_norm = sum(each.chosen_norm == each.question.right for each in scored)
    values = {
        "task": "multiple-choice",
        "acc": _share(num_right, len(asked)),
        "acc_norm": _share(num_right_norm, len(asked)),
        "chance": sum(1 / len(question.choices) for question, _ in asked) / len(asked),
        "num_rows": len(asked),
        "num_too_long": len(asked) - len(fitting),
        "num_bad": len(rows.bad),
    }
    return Outcome(values, [_scored_to_row(each) for each in scored], rows.bad)


def _candidates(
    rows: Rows, tokenizer: Any, is_plain: bool
) -> Iterator[tuple[Question, list[Candidate]]]:
    questions = read_questions(rows.source, on_bad_row=rows.on_bad_row)
    for question in islice(questions, rows.limit):
        try:
            found = encode_choices(question, tokenizer, plain=is_plain)
        except DataError as error:
            if rows.on_bad_row is None:
                raise
            rows.on_bad_row(error)
            continue
        yield question, found


def _fits(candidates: Sequence[Candidate], context: int | None) -> bool:
    return context is None or max(len(each.ids) for each in candidates) <= context


def _refuse_nothing(found: Sequence[object], rows: Rows) -> None:
    if not found:
        first = rows.bad[0].what if rows.bad else ""
        raise fault("no-target", path=rows.source, why=f"no row is usable; {first}")


def _share(num_hits: int, num_rows: int) -> dict[str, Any]:
    found = proportion(num_hits, num_rows)
    return {} if found is None else found.to_dict()


def _told_to_row(told: Told) -> dict[str, Any]:
    prompt = told.prompt
    return {
        "path": prompt.path,
        "line": prompt.line,
        "answer": told.text,
        "expected": prompt.answer,
        "is_exact": told.is_exact,
    }


def _scored_to_row(scored: Scored) -> dict[str, Any]:
    question = scored.question
    return {
        "path": question.path,
        "line": question.line,
        "right": question.right,
        "chosen": scored.chosen,
        "chosen_norm": scored.chosen_norm,
        "loglikelihoods": list(scored.loglikelihoods),
    }
