"""Every event goes everywhere, and the last one says how a run ended."""

import csv
from contextlib import closing

import pytest

from nibble.disk import disk_errors
from nibble.errors import NonFiniteError
from nibble.events import EventLog, MetricsTable, RunEnd, StepEnd, WarningRaised, read_events
from nibble.train.report import Reporter

STEP = StepEnd(1, 2.5, 10, 20, 1e-3, 0.7, 0.5, 40.0, 1000)


@pytest.fixture
def report(tmp_path):
    heard = []
    with closing(EventLog(tmp_path / "events.jsonl")) as log:
        yield Reporter(log, heard.append, MetricsTable(tmp_path / "metrics.csv")), heard, tmp_path


def _rows(folder):
    with (folder / "metrics.csv").open() as file:
        return [row["step"] for row in csv.DictReader(file)]


def test_log_table_and_listener_hear_the_same(report):
    report, heard, folder = report
    events = [STEP, WarningRaised("x"), RunEnd("finished", 0.5, 20, 1000)]
    for event in events:
        report(event)
    assert heard == list(read_events(folder / "events.jsonl")) == events
    assert _rows(folder) == ["1"]


def test_the_end_of_a_failed_run_counts_its_steps(report):
    report, heard, folder = report
    report.seconds, report.tokens = 2.0, 100
    report(STEP)
    with pytest.raises(NonFiniteError), report.end_told():
        raise NonFiniteError("the loss is nan\nmore", fix="")
    assert heard[-1] == RunEnd("the loss is nan", 2.5, 120, 1000)
    assert list(read_events(folder / "events.jsonl"))[-1] == heard[-1]
    assert _rows(folder) == ["1"]


def test_an_end_that_cannot_be_written_does_not_hide_the_error(report, monkeypatch):
    report, _, _ = report

    def full(event):
        raise OSError("No space left on device")

    monkeypatch.setattr(report, "log", full)
    with pytest.raises(NonFiniteError), report.end_told():
        raise NonFiniteError("the loss is nan", fix="")


def test_a_listener_that_fails_is_no_fault_of_the_disk(report):
    report, _, folder = report

    def hang_up(event):
        raise ConnectionRefusedError("nobody listens")

    report.emit = hang_up
    with (
        pytest.raises(RuntimeError, match="who listens to the run failed: nobody listens"),
        disk_errors("the run"),
    ):
        report(STEP)
    assert list(read_events(folder / "events.jsonl")) == [STEP]


def test_a_mistake_in_the_code_is_no_end(report):
    report, heard, _ = report
    with pytest.raises(ZeroDivisionError), report.end_told():
        raise ZeroDivisionError
    assert heard == []
