"""A run goes on from the newest whole checkpoint that is its own."""

from contextlib import closing

import pytest
import torch
from torch import nn

from nibble.errors import DiskError, FolderInUseError, UsageError
from nibble.events import EventLog, StepEnd, WarningRaised
from nibble.train.checkpoint import STATE_FILE, TrainState, save
from nibble.train.optimizer import AdamW, ParameterGroup
from nibble.train.resume import check_steps, find_state, standing_table

STEP = StepEnd(1, 2.5, 10, 20, 1e-3, 0.7, 0.5, 40.0, 1000)
IDENTITY = {"optim.lr": "0.1", "data": "a" * 64}


def _optimizer(value=0.0):
    return AdamW([ParameterGroup((nn.Parameter(torch.full((4,), value)),))])


@pytest.fixture
def folder(tmp_path):
    for step in (1, 2):
        save(tmp_path, TrainState(step), _optimizer(float(step)), identity=IDENTITY)
    return tmp_path


def _find(folder, *, identity=IDENTITY, allow_change=()):
    events, optimizer = [], _optimizer()
    state, changed = find_state(
        folder, optimizer, identity=identity, allow_change=allow_change, emit=events.append
    )
    warnings = [event.message for event in events if isinstance(event, WarningRaised)]
    assert changed == [name for name in identity if identity[name] != IDENTITY[name]]
    return state.step, optimizer.groups[0].parameters[0][0].item(), warnings


def test_the_newest_is_loaded(folder):
    assert _find(folder) == (2, 2.0, [])


def test_without_checkpoints_a_run_begins(tmp_path):
    assert _find(tmp_path / "none") == (0, 0.0, [])


def test_what_a_crash_left_is_deleted(folder):
    (folder / ".tmp-step-00000003").mkdir()
    (folder / ".tmp-step-00000003" / STATE_FILE).write_bytes(b"half")
    assert _find(folder)[0] == 2
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000001", "step-00000002"]


def test_a_damaged_one_is_named_and_the_one_before_is_used(folder):
    (folder / "step-00000002" / STATE_FILE).write_bytes(b"")
    step, value, (warning,) = _find(folder)
    assert (step, value) == (1, 1.0)
    assert f"step-00000002/{STATE_FILE} has other bytes" in warning
    assert "going on from step 1 instead" in warning


def test_all_damaged_is_an_error(folder):
    for step in (1, 2):
        (folder / f"step-0000000{step}" / STATE_FILE).write_bytes(b"")
    with pytest.raises(DiskError, match="every checkpoint"):
        _find(folder)


def test_what_has_changed_is_refused_by_name(folder):
    other = {"optim.lr": "0.2", "data": "b" * 64}
    with pytest.raises(FolderInUseError) as refused:
        _find(folder, identity=other)
    assert "optim.lr: 0.1 -> 0.2, data: aaaaaaaaaaaa... -> bbbbbbbbbbbb..." in refused.value.what
    assert "--allow-change optim.lr --allow-change data" in refused.value.fix
    assert refused.value.exit_code == 73
    with pytest.raises(FolderInUseError) as refused:
        _find(folder, identity=other, allow_change=["optim.lr"])
    assert refused.value.fix.endswith("go on with the change: --allow-change data")


def test_more_steps_than_asked_for_are_refused():
    check_steps(3, 3)
    with pytest.raises(UsageError, match="4 steps are done, and the run is to have 3"):
        check_steps(4, 3)


def test_a_table_that_has_more_than_the_log_is_set_aside(tmp_path):
    events = []
    (tmp_path / "metrics.csv").write_text("all of it")
    with closing(EventLog(tmp_path / "events.jsonl")) as log:
        log(STEP)
        standing_table(tmp_path, 1, events.append)
        assert not events
        assert not (tmp_path / "metrics.csv.old").exists()
        (tmp_path / "metrics.csv").write_text("all of it")
        standing_table(tmp_path, 2, events.append)
    assert "has 1 of the 2 steps" in events[0].message
    assert (tmp_path / "metrics.csv.old").read_text() == "all of it"
    assert (tmp_path / "metrics.csv").read_text().startswith("step,train_loss")


def test_what_may_change_is_said(folder):
    other = {**IDENTITY, "data": "b" * 64}
    step, _, (warning,) = _find(folder, identity=other, allow_change=["data"])
    assert step == 2
    assert warning == "going on with other data than the run began with"
