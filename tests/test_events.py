"""The log of a run, and the table made of it."""

import csv
import json
from contextlib import closing
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nibble.events import (
    EvalEnd,
    EventLog,
    MetricsTable,
    RunEnd,
    StepEnd,
    WarningRaised,
    event_name,
    last_attempts,
    read_events,
)

STEP = StepEnd(1, 2.5, 10, 20, 1e-3, 0.7, 0.5, 40.0, 1000)
EVAL = EvalEnd(1, 2.0, 7.39, 0.5, 30)
END = RunEnd("finished", 1.0, 20, 1000)


def test_names_are_those_of_the_contract():
    assert [event_name(e) for e in (STEP, EVAL, END, WarningRaised("x"))] == [
        "step",
        "eval",
        "run_end",
        "warning",
    ]


def test_log_round_trip_survives_a_torn_line(tmp_path):
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    for event in (STEP, EVAL, END):
        log(event)
    log.close()
    with path.open("a") as file:
        file.write('{"event": "st')
    assert list(read_events(path)) == [STEP, EVAL, END]


def test_metrics_rows(tmp_path):
    table = MetricsTable(tmp_path / "metrics.csv")
    for event in (EvalEnd(0, 3.0, 20.1, 0.1, 30), STEP, EVAL, END):
        table(event)
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["eval_loss"] for row in rows] == ["3.0", "2.0"]
    assert (rows[1]["step"], rows[1]["tokens"]) == ("1", "20")


def test_a_log_goes_on_after_a_torn_line(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"event": "st')
    with closing(EventLog(path)) as log:
        log(STEP)
        log.sync()
    assert list(read_events(path)) == [STEP]


def test_a_table_begins_anew_with_the_steps_that_stand(tmp_path):
    """A run that died after step 2 and goes on from step 1 takes step 2 once more."""
    first, lost, again = STEP, replace(STEP, step=2, loss=9.0), replace(STEP, step=2, loss=2.0)
    log = [EvalEnd(0, 3.0, 20.1, 0.1, 30), first, EVAL, lost]
    (tmp_path / "metrics.csv").write_text("step\n7\n")
    table = MetricsTable(tmp_path / "metrics.csv", last_attempts(log, 1))
    for event in (again, END):
        table(event)
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["train_loss"], row["tokens"]) for row in rows] == [
        ("0", "", ""),
        ("1", "2.5", "20"),
        ("2", "2.0", "40"),
    ]


def test_of_steps_that_were_taken_twice_the_last_stand():
    again = replace(STEP, loss=1.0)
    events = [STEP, EVAL, replace(STEP, step=2), END, again, EVAL]
    assert last_attempts(events, 1) == [again, EVAL]


@pytest.mark.parametrize(
    "wrong",
    [
        {"step": "1"},
        {"loss": None},
        {"step": 1.5},
        {"seconds": [1]},
        {"tokens": {}},
        {"step": True},
    ],
)
def test_values_of_other_kinds_are_passed_over(tmp_path, wrong):
    path = tmp_path / "events.jsonl"
    with closing(EventLog(path)) as log:
        log(STEP)
        log(replace(STEP, loss=2))
    content = path.read_text()
    record = json.loads(content.splitlines()[0])
    path.write_text(content + json.dumps({**record, **wrong}) + "\n")
    assert list(read_events(path)) == [STEP, replace(STEP, loss=2)]


@pytest.mark.torture
@given(
    line=st.binary(max_size=200)
    | st.dictionaries(st.sampled_from(["event", "step", "loss"]), st.integers() | st.text()).map(
        lambda value: json.dumps(value).encode()
    )
)
def test_any_line_is_an_event_or_passed_over(tmp_path_factory, line):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(line + b"\n" + json.dumps({"event": "warning", "message": "x"}).encode())
    assert list(read_events(path))[-1] == WarningRaised("x")
