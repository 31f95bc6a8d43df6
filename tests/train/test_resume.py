"""A run goes on from the newest whole checkpoint that is its own."""

import pytest
import torch
from torch import nn

from nibble.errors import DiskError, FolderInUseError
from nibble.events import WarningRaised
from nibble.train.checkpoint import STATE_FILE, TrainState, save
from nibble.train.optimizer import AdamW, ParameterGroup
from nibble.train.resume import find_state

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


def test_what_may_change_is_said(folder):
    other = {**IDENTITY, "data": "b" * 64}
    step, _, (warning,) = _find(folder, identity=other, allow_change=["data"])
    assert step == 2
    assert warning == "going on with other data than the run began with"
