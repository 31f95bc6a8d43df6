"""Figures of a run off its own events."""

import json
from contextlib import closing
from dataclasses import replace

import pytest

from nibble.events import (
    EvalEnd,
    EventLog,
    LoadEnd,
    RunEnd,
    RunStart,
    StepEnd,
    WarningRaised,
)
from nibble.experiment.compare import Record, run_name
from nibble.experiment.figures import read_runs

MEASURED = {
    "num_short": 4,
    "num_exact": 3,
    "general_before": 4.0,
    "general_after": 4.5,
    "num_general_tokens": 9,
}


def step(number, *, seconds, loss=2.0):
    return StepEnd(number, loss, 10, 100, 1e-3, 1.0, seconds, 100 / seconds, 5000)


def events(*, has_eval=True):
    yield RunStart("qlora", "m", "cpu", 3, 0, 12, 4, {}, 1)
    yield LoadEnd({"nf4 codes": 600, "float32 adapters": 400}, 1000, 40, 2000, 0.5)
    yield WarningRaised("twice")
    if has_eval:
        yield EvalEnd(0, 5.0, 148.0, 0.25, 40)
    yield replace(step(1, seconds=9.0), peak_memory_bytes=7000)
    # The run was killed here and went on from its start.
    yield RunStart("qlora", "m", "cpu", 3, 0, 12, 4, {}, 1)
    yield LoadEnd({"nf4 codes": 600, "float32 adapters": 400}, 1000, 40, 2000, 0.25)
    yield WarningRaised("twice")
    if has_eval:
        yield EvalEnd(0, 5.0, 148.0, 0.25, 40)
    yield step(1, seconds=1.0, loss=3.0)
    yield step(2, seconds=2.0)
    yield step(3, seconds=4.0)
    if has_eval:
        yield EvalEnd(3, 1.5, 4.5, 0.75, 40)
    yield RunEnd("finished", 7.0, 300, 5000, 4000, "a", 60, {})


@pytest.fixture
def read(tmp_path):
    def make(record, **options):
        out = tmp_path / run_name("qlora", 1)
        out.mkdir()
        with closing(EventLog(out / "events.jsonl")) as log:
            for event in events(**options):
                log(event)
        plan = {
            "peak_memory_bytes": 4000, "uncorrected_peak_memory_bytes": 4000, "device": "CPU",
            "budget_bytes": 9000, "parts": {"base": 600}, "reasons": [], "settings": {"a": 1},
        }  # fmt: skip
        (out / "plan.json").write_text(json.dumps(plan))
        (run,) = read_runs(tmp_path, {("qlora", 1): record, ("full", 1): Record(78)})
        return run

    return make


def test_every_figure_is_of_the_steps_that_stand(read):
    run = read(Record(0, seconds=12.0, measured=MEASURED))
    assert (run.method, run.seed) == ("qlora", 1)
    assert run.values == {
        "base_bytes": 600,
        "saved_bytes": 60,
        "saved_share": 0.1,
        "trained_values": 40,
        "setup_seconds": 0.25,
        "step_seconds": 2.0,
        "train_seconds": 7.0,
        "total_seconds": 12.0,
        "tokens_per_s": pytest.approx(300 / 7),
        "peak_memory_bytes": 7000,
        "predicted_peak_memory_bytes": 4000,
        "eval_loss_before": 5.0,
        "eval_loss": 1.5,
        "token_accuracy_before": 0.25,
        "token_accuracy": 0.75,
        "exact_match": 0.75,
        "general_loss_before": 4.0,
        "general_loss": 4.5,
        "forgetting": 0.5,
    }
    assert run.losses == {1: 3.0, 2: 2.0, 3: 2.0}
    assert run.held_out == {0: 5.0, 3: 1.5}
    assert run.warnings == ("twice",)
    assert (run.parts, run.settings) == ({"base": 600}, {"a": 1})


def test_what_was_not_measured_is_left_out(read):
    values = read(Record(0, measured={**MEASURED, "num_short": 0}), has_eval=False).values
    assert not values.keys() & {"exact_match", "total_seconds", "eval_loss", "eval_loss_before"}
    assert values["forgetting"] == 0.5
