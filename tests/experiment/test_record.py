"""Whose folder it is, and what stands in it."""

import pytest

from nibble.errors import FolderInUseError
from nibble.experiment import record
from nibble.experiment.placement import Need
from nibble.experiment.record import Planned
from nibble.train.owner import held


def _write(out, planned, **options):
    record.write_record(out, planned, has_halving=False, **options)


def _read(out, planned, *, has_halving=False):
    return record.read_record(out, [one.trial for one in planned], has_halving=has_halving)


def test_what_was_planned_stands_as_it_was(tmp_path, stub):
    planned = [
        Planned(one.trial, one.run.with_values({"train.micro_batch_size": 2}, "planner"), Need(7))
        for one in stub([0.01, 0.02], [1, 1])
    ]
    planned[1] = Planned(planned[1].trial, planned[1].trial.run, Need(9), 78, "too large")
    assert _read(tmp_path, planned) == []
    _write(tmp_path, planned)
    (first,) = _read(tmp_path, planned)  # what could not start is planned again
    assert (first.trial.name, first.need) == ("run-1", Need(7))
    assert first.run.train.micro_batch_size == 2
    assert first.run.origin("train.micro_batch_size") == "planner"


@pytest.mark.parametrize(
    "change",
    [
        lambda out, other: _read(out, other),
        lambda out, other: _read(out, other[:1]),
        lambda out, other: (out / "sweep.json").write_text("{") and _read(out, other),
    ],
)
def test_another_sweep_is_refused_once_something_was_trained(tmp_path, stub, change):
    _write(tmp_path, stub([0.01, 0.02], [1, 1]))
    other = stub([0.01, 0.03], [1, 1])
    assert _read(tmp_path, other) == []
    (tmp_path / "run-2" / "checkpoints").mkdir(parents=True)
    with pytest.raises(FolderInUseError, match="holds another sweep"):
        change(tmp_path, other)


def test_another_sweep_is_refused_while_a_run_is_at_work(tmp_path, stub):
    """A run of a killed sweep, before its first checkpoint, would be taken for one of the new."""
    _write(tmp_path, stub([0.01, 0.02], [1, 1]))
    other = stub([0.01, 0.03], [1, 1])
    with held(tmp_path / "run-2"), pytest.raises(FolderInUseError, match="holds another sweep"):
        _read(tmp_path, other)
    assert _read(tmp_path, other) == []


def test_a_record_that_cannot_be_read_is_another_sweep(tmp_path, stub):
    planned = stub([0.01], [1])
    _write(tmp_path, planned)
    text = (tmp_path / "sweep.json").read_bytes()
    wrong = text.replace(b'"planned": {', b'"planned": {"optim.no": 1')
    for content in (b"\xff", wrong):
        assert content != text
        (tmp_path / "sweep.json").write_bytes(content)
        with pytest.raises(FolderInUseError, match="holds another sweep"):
            _read(tmp_path, planned)


def test_with_halving_it_is_another_sweep(tmp_path, stub):
    planned = stub([0.01, 0.02], [1, 1])
    _write(tmp_path, planned)
    (tmp_path / "run-1" / "checkpoints").mkdir(parents=True)
    assert len(_read(tmp_path, planned)) == 2
    with pytest.raises(FolderInUseError):
        _read(tmp_path, planned, has_halving=True)


def test_a_folder_of_something_else_is_refused(tmp_path):
    with record.hold(tmp_path / "new"), pytest.raises(FolderInUseError, match="in use by process"):
        record.hold(tmp_path / "new").__enter__()
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(FolderInUseError, match=r"thesis\.txt"), record.hold(tmp_path):
        pass
    with pytest.raises(FolderInUseError, match="is a file"), record.hold(tmp_path / "thesis.txt"):
        pass
