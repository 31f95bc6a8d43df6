"""A run as a process of its own."""

import json
import os
import signal
import time

import pytest

import nibble
from nibble.events import StepEnd, read_events
from nibble.experiment import engine
from nibble.train import folder


@pytest.fixture
def run(tiny_model_folder, tmp_path):
    rows = [{"prompt": f"say {n}", "completion": f"{n}"} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [
        *(f"model.name={tiny_model_folder('llama')}", f"data.train={tmp_path / 'rows.jsonl'}"),
        *("method=lora", "train.steps=3", "train.batch_size=4", "data.max_seq_len=64"),
        *("train.micro_batch_size=2", "train.recompute=none", "optim.paged=false"),
    ]
    return nibble.load_config(None, settings)


def test_a_run_finishes_in_its_folder(run, tmp_path):
    ended = _wait(engine.start(run, tmp_path, "first"))
    assert (ended.exit_code, ended.reason) == (0, "")
    assert folder.is_finished(tmp_path / "first")
    assert folder.read_run(tmp_path / "first").train.steps == 3
    assert 0 < ended.seconds < 120
    assert "training loss" in (tmp_path / "first.log").read_text()


def test_a_run_that_fails_says_why(run, tmp_path):
    broken = run.with_values({"data.train": str(tmp_path / "none.jsonl")}, "flag")
    ended = _wait(engine.start(broken, tmp_path, "broken"))
    assert ended.exit_code == 65
    assert "none.jsonl" in ended.reason
    assert ended.fix
    assert "fix:" not in ended.fix


def test_a_run_is_stopped_in_order_and_goes_on(run, tmp_path):
    longer = run.with_values({"train.steps": 2000}, "flag")
    started = engine.start(longer, tmp_path, "long")
    _wait_for_steps(tmp_path / "long", 2)
    engine.stop(started)
    ended = engine.ended(started)
    assert ended.exit_code == 75
    assert "stopped by SIGTERM" in ended.reason
    again = engine.start(longer, tmp_path, "long")
    _wait_for_steps(tmp_path / "long", _num_steps(tmp_path / "long") + 1)
    os.kill(again.process.pid, signal.SIGKILL)
    ended = _wait(again)
    assert (ended.exit_code, ended.reason) == (-signal.SIGKILL, "killed by SIGKILL")


def _wait(started):
    started.process.wait(120)
    return engine.ended(started)


def _num_steps(out):
    path = out / "events.jsonl"
    return sum(isinstance(e, StepEnd) for e in read_events(path)) if path.is_file() else 0


def _wait_for_steps(out, number):
    give_up = time.monotonic() + 120
    while _num_steps(out) < number:
        assert time.monotonic() < give_up
        time.sleep(0.1)
