"""The table of results: order, winner, files."""

import csv
import json

import pytest

from nibble.events import RunEnd
from nibble.experiment import ranking
from nibble.experiment.follow import Followed
from nibble.experiment.sweep import Row


def _row(tmp_path, planned, state, *, loss, evals=(), lost_at=None):
    name = planned.trial.name
    end = RunEnd("finished", 2.0, 30, 5, 6, f"/elsewhere/{name}/adapter", 1, {"a": name})
    followed = Followed(tmp_path / name, step=12, steps=12, loss=loss, eval_losses=dict(evals))
    followed.end = end if state == "finished" else None
    return Row(planned, followed, state, place="gpu0", lost_at=lost_at, reason="why")


def test_order_winner_and_files(tmp_path, stub):
    runs = stub([0.01, 0.02, 0.03, 0.04, 0.05], [1] * 5)
    rows = [
        _row(tmp_path, runs[0], "finished", loss=1.0, evals={0: 9.0, 12: 3.0}),
        _row(tmp_path, runs[1], "failed", loss=None),
        _row(tmp_path, runs[2], "stopped early", loss=1.0, evals={6: 4.0, 12: 1.0}, lost_at=6),
        _row(tmp_path, runs[3], "finished", loss=2.0, evals={12: 2.0}),
        _row(tmp_path, runs[4], "stopped early", loss=1.0, evals={3: 0.5}, lost_at=3),
    ]
    found = ranking.rank(rows)
    assert [one.name for one in found.results] == ["run-4", "run-1", "run-3", "run-5", "run-2"]
    assert (found.winner, found.by, found.notes) == ("run-4", "eval_loss", [])
    assert found.named("run-4").adapter == str(tmp_path / "run-4" / "adapter")
    assert found.named("run-3").eval_loss == 4.0
    assert found.named("run-3").reason == "the better half went on at step 6"
    ranking.write_ranking(tmp_path, found)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["version"] == 1
    assert report["winner"]["settings"] == {"optim.lr": 0.04}
    with (tmp_path / "sweep.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["name"] for line in lines] == [one.name for one in found.results]
    assert (lines[0]["optim.lr"], lines[0]["eval_loss"], lines[0]["state"]) == (
        "0.04", "2.0", "finished",
    )  # fmt: skip


def test_training_loss_decides_where_nothing_is_held_out_and_it_is_said(tmp_path, stub):
    runs = stub([0.01, 0.02], [1, 1], "data.eval=null")
    rows = [
        _row(tmp_path, one, "finished", loss=n) for one, n in zip(runs, (2.0, 1.0), strict=True)
    ]
    found = ranking.rank(rows)
    assert (found.winner, found.by) == ("run-2", "train_loss")
    assert found.notes[0].startswith("Sorted by training loss")


def test_losses_over_other_tokens_are_named(tmp_path, stub):
    from nibble.experiment.grid import grid_trials
    from nibble.experiment.record import Planned

    given = ["model.name=m", "data.train=d", "data.eval=0.1"]
    trials = grid_trials(None, ["data.max_seq_len=64,128", "train.seed=1,2"], given)
    (one,) = stub([0.01], [1])
    rows = [
        _row(tmp_path, Planned(t, t.run, one.need), "finished", loss=1.0, evals={1: 2.0})
        for t in trials
    ]
    (note,) = ranking.rank(rows).notes
    assert note.startswith("Runs differ in data.max_seq_len, train.seed:")


def test_methods_that_plans_chose_differently_are_named(tmp_path, stub):
    first, second = stub([0.01, 0.02], [1, 1])
    other = type(second)(second.trial, second.run.with_values({"method": "qlora"}, "planner"), None)
    rows = [_row(tmp_path, one, "finished", loss=1.0) for one in (first, other)]
    assert "Their plans chose different methods: lora and qlora." in ranking.rank(rows).notes


@pytest.mark.parametrize("state", ["failed", "does not fit"])
def test_without_a_finished_run_there_is_no_winner(tmp_path, stub, state):
    found = ranking.rank([_row(tmp_path, one, state, loss=None) for one in stub([0.01], [1])])
    assert (found.winner, found.to_dict()["winner"]) == ("", None)
    assert found.results[0].reason == "why"
