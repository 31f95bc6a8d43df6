"""What a person sees of a sweep."""

import io
import sys
from pathlib import Path

import pytest
from rich.console import Console

from nibble.commands import board
from nibble.commands.board import Board
from nibble.experiment.follow import Followed
from nibble.experiment.grid import grid_trials
from nibble.experiment.placement import Need
from nibble.experiment.ranking import rank
from nibble.experiment.record import Planned
from nibble.experiment.sweep import Row


@pytest.fixture
def rows():
    """Six: at work, done, failed, and three that wait."""
    given = ["model.name=m", "data.train=d"]
    trials = grid_trials(None, ["lora.target=[a],[b],[c],[d],[e],[f]"], given)
    found = [Row(Planned(t, t.run, Need(1)), Followed(Path(t.name))) for t in trials]
    found[0].state, found[0].place = "running", "cuda:0"
    found[1].state = "finished"
    found[2].state, found[2].reason = "failed", "bad [rows] in a.jsonl"
    found[0].followed.step, found[0].followed.steps, found[0].followed.loss = 5, 20, 2.5
    found[0].followed._pace.extend([2.0, 4.0])
    found[1].followed.loss, found[1].followed.eval_losses = 2.0, {20: 1.75}
    return found


def _shown(table, width=120):
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()


def test_the_live_table_says_where_each_run_is(rows):
    lines = _shown(board._live_table(rows, 40, 120)).splitlines()
    assert lines[0].startswith("1 of 6 runs done")
    at_work, done, failed = lines[2:5]
    for words in ("run-1", 'lora.target=["a"]', "cuda:0", "running", "5/20", "2.5000", "0:45"):
        assert words in at_work
    assert "1.7500" in done
    assert "failed: bad [rows] in a.jsonl" in failed


def test_what_does_not_fit_the_screen_is_counted(rows):
    text = _shown(board._live_table(rows, 8, 120))
    assert "3 more below" in text
    assert "run-1" in text
    assert "run-2" not in text


@pytest.mark.parametrize("width", [26, 40, 60, 80])
def test_a_narrow_terminal_has_fewer_columns_and_whole_numbers(rows, width, monkeypatch, capsys):
    text = _shown(board._live_table(rows, 40, width), width)
    assert "…" not in text
    for words in ("run-1", "run-6", "2.5000", "2.0000", "1.7500"):
        assert words in text
    assert ("failed" in text) == (width >= 40)
    assert ("cuda:0" in text) == (width >= 80)
    monkeypatch.setenv("COLUMNS", str(width))
    board.print_ranking(rank(rows))
    text = capsys.readouterr().out
    assert "…" not in text
    for words in ("run-1", "1.7500", "best     run-2"):
        assert words in text
    assert ("failed" in text) == (width >= 40)
    assert ("2.0000" in text) == (width >= 60)


def test_without_a_terminal_there_is_a_line_when_something_happens(rows, capsys):
    with Board() as shown:
        shown(rows)
        shown(rows)
        rows[0].followed.step = 12
        shown(rows)
        rows[3].state, rows[3].place = "running", "cuda:1"
        shown(rows)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "run-1 step 5 of 20: loss 2.5000",
        "run-2 finished: loss 2.0000, held-out loss 1.7500",
        "run-3 failed: bad [rows] in a.jsonl",
        "run-1 step 12 of 20: loss 2.5000",
        'run-4 running on cuda:1: lora.target=["d"]',
    ]


def test_a_terminal_gets_the_table_and_a_sweep_outlives_its_reader(rows, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    file = io.StringIO()
    monkeypatch.setattr(sys, "stderr", file)
    with Board() as shown:
        shown(rows)
        assert "runs done" in file.getvalue()

        def refuse(rows, height, width):
            raise BrokenPipeError

        monkeypatch.setattr(board, "_live_table", refuse)
        shown._shown_at = 0.0
        shown(rows)
