"""The log of a run, and the table made of it."""

import csv

from nibble.events import (
    EvalEnd,
    EventLog,
    MetricsTable,
    RunEnd,
    StepEnd,
    WarningRaised,
    event_name,
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
