"""The result of a run is read off its log."""

from contextlib import closing
from dataclasses import replace

from nibble.events import EvalEnd, EventLog, RunEnd, StepEnd
from nibble.train.result import Result, read_result

STEP = StepEnd(1, 2.5, 10, 20, 1e-3, 0.7, 0.5, 40.0, 1000)
EVAL = EvalEnd(1, 2.0, 7.39, 0.5, 30)


def test_the_last_of_each_counts(tmp_path):
    end = RunEnd("finished", 2.0, 60, 3000, adapter="before/it/was/moved/adapter")
    last = replace(STEP, step=2, loss=1.5)
    with closing(EventLog(tmp_path / "events.jsonl")) as log:
        for event in (EVAL, STEP, last, replace(EVAL, step=2, loss=1.0), end):
            log(event)
    assert read_result(tmp_path) == Result(
        out=tmp_path,
        adapter=tmp_path / "adapter",
        final_loss=1.5,
        eval_loss=1.0,
        peak_memory_bytes=3000,
        tokens_per_s=30.0,
    )
