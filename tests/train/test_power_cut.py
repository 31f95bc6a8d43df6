"""Power cuts and full disks at every write, flush and rename of a save.

A disk here remembers, beside what processes see, what would be left after a power cut: the bytes
of a file as they were when it was last flushed, the names in a folder as they were when that was.
"""

import errno
import os
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import nn

from nibble.disk import faults_at
from nibble.errors import DiskError
from nibble.train.checkpoint import TrainState, clear_unfinished, latest, restore, save
from nibble.train.optimizer import AdamW, ParameterGroup

NUM_VALUES = 50


@dataclass
class Disk:
    """What is safe of a folder, by inode; to be given to `faults_at`.

    Every fault point comes before its operation: its effect is taken over at the next one.
    """

    root: Path
    bytes_of: dict[int, bytes] = field(default_factory=dict)
    names_in: dict[int, dict[str, int]] = field(default_factory=dict)
    pending: tuple[str, Path] | None = None

    def flush_all(self):
        for path in [self.root, *self.root.rglob("*")]:
            self.flush(path)

    def flush(self, path):
        if path.is_dir():
            self.names_in[_inode(path)] = {each.name: _inode(each) for each in path.iterdir()}
        elif path.is_file():
            self.bytes_of[_inode(path)] = path.read_bytes()

    def __call__(self, name, *paths):
        done, path = self.pending or ("", self.root)
        if done == "disk.before_make":
            self.forget(path)
            self.names_in[_inode(path)] = {}
        elif done in ("disk.before_fsync", "disk.before_sync"):
            self.flush(path)
        if name == "disk.before_write" and paths[0].stat().st_size == 0:
            self.forget(paths[0])
        self.pending = (name, paths[0]) if paths else None

    def forget(self, path):
        """A new file or folder may have the number of one that is gone."""
        self.bytes_of.pop(_inode(path), None)
        self.names_in.pop(_inode(path), None)

    def left_over(self, target, *, names):
        """Write what a power cut would leave.

        Args:
            names: "flushed" loses every name that was not, "seen" keeps those that were seen last,
                with the bytes that were flushed: what a file system that orders nothing may do.
        """
        if names == "flushed":
            self._copy_flushed(_inode(self.root), target)
            return
        for path in sorted(self.root.rglob("*")):
            copy = target / path.relative_to(self.root)
            if path.is_dir():
                copy.mkdir(parents=True)
            else:
                copy.write_bytes(self.bytes_of.get(_inode(path), b""))

    def _copy_flushed(self, folder, target):
        target.mkdir(exist_ok=True)
        for name, inode in self.names_in.get(folder, {}).items():
            if inode in self.names_in:
                self._copy_flushed(inode, target / name)
            else:
                (target / name).write_bytes(self.bytes_of.get(inode, b""))


def _inode(path):
    return path.stat().st_ino


def _optimizer(step):
    optimizer = AdamW([ParameterGroup((nn.Parameter(torch.full((NUM_VALUES,), float(step))),))])
    optimizer.num_steps = step
    return optimizer


def _save(folder, step):
    """Steps 2 and 5 are the best so far."""
    loss = {2: 2.0, 3: 3.0, 5: 1.0}.get(step)
    state = TrainState(step, eval_loss=loss, best_eval_loss=loss and min(loss, 2.0))
    save(folder, state, _optimizer(step), identity={"data": "x"}, resumed_from=1)


def _assert_restorable(folder, *, at_least):
    with faults_at(lambda name, *paths: None):
        clear_unfinished(folder)
    found, _ = latest(folder)
    assert found is not None
    assert found.state.step >= at_least
    optimizer = _optimizer(0)
    restore(found, optimizer)
    (value,) = optimizer.groups[0].parameters
    assert torch.equal(value, torch.full((NUM_VALUES,), float(found.state.step)))


def test_a_power_cut_at_any_point_loses_one_save_at_most(tmp_path):
    """Six saves; after a cut at each of their points the one before, or this one, is whole."""
    root, num_cuts = tmp_path / "run", 0
    root.mkdir()
    disk = Disk(root)
    folder = root / "checkpoints"
    _save(folder, 1)
    disk.flush_all()
    for step in range(2, 8):

        def cut(name, *paths, before=step - 1):
            nonlocal num_cuts
            disk(name, *paths)
            for names in ("flushed", "seen"):
                target = tmp_path / "left"
                target.mkdir()
                disk.left_over(target, names=names)
                _assert_restorable(target / "checkpoints", at_least=before)
                shutil.rmtree(target)
                num_cuts += 1

        with faults_at(cut):
            _save(folder, step)
        disk("end")
        target = tmp_path / "left"
        disk.left_over(target, names="flushed")
        _assert_restorable(target / "checkpoints", at_least=step)
        shutil.rmtree(target)
    print(f"power cuts in {step - 1} saves, each followed by a whole checkpoint: {num_cuts}")
    assert num_cuts > 200


def test_the_first_save_is_whole_or_not_there(tmp_path):
    root = tmp_path / "run"
    root.mkdir()
    disk = Disk(root)
    disk.flush_all()

    def cut(name, *paths):
        disk(name, *paths)
        target = tmp_path / "left"
        target.mkdir()
        disk.left_over(target, names="flushed")
        with faults_at(lambda name, *paths: None):
            clear_unfinished(target / "checkpoints")
        found, damages = latest(target / "checkpoints")
        assert damages == []
        assert found is None or found.state.step == 1
        shutil.rmtree(target)

    with faults_at(cut):
        _save(root / "checkpoints", 1)
    disk("end")
    disk.left_over(tmp_path / "left", names="flushed")
    _assert_restorable(tmp_path / "left" / "checkpoints", at_least=1)


def test_a_disk_that_forgets_to_flush_would_be_found_out(tmp_path, monkeypatch):
    """The test above fails where a file is not flushed before it gets its name."""
    root = tmp_path / "run"
    root.mkdir()
    disk = Disk(root)
    _save(root / "checkpoints", 1)
    disk.flush_all()

    def without_fsync(name, *paths):
        if name == "disk.before_fsync":
            name = "skipped"
        disk(name, *paths)

    with faults_at(without_fsync):
        _save(root / "checkpoints", 2)
    disk("end")
    disk.left_over(tmp_path / "left", names="flushed")
    found, damages = latest(tmp_path / "left" / "checkpoints")
    assert found.state.step == 1
    assert len(damages) == 1


def _points_of_a_save(folder):
    points = []
    for step in (1, 2, 3):
        _save(folder, step)
    with faults_at(lambda name, *paths: points.append(name)):
        _save(folder, 4)
    return points


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_at_any_write_leaves_the_old_ones(tmp_path, error):
    points = _points_of_a_save(tmp_path / "measure")
    assert len(points) > 10
    for number, point in enumerate(points):
        if not point.startswith("disk."):
            continue
        folder, count = tmp_path / str(number), iter(range(len(points) + 20))
        for step in (1, 2, 3):
            _save(folder, step)

        def fail(name, *paths, count=count, number=number):
            if next(count) == number:
                raise OSError(error, os.strerror(error))

        with faults_at(fail), pytest.raises(DiskError, match=os.strerror(error)) as failed:
            _save(folder, 4)
        assert failed.value.exit_code == 74
        _assert_restorable(folder, at_least=3)
        assert len(list(folder.iterdir())) <= 5


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 20 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_small_disk_runs_full(small_disk):
    """Two checkpoints of 8 MB fit and no third; what was saved stays, and what failed is gone."""
    folder = small_disk / "checkpoints"

    def big(step):
        values = nn.Parameter(torch.full((700_000,), float(step)))
        optimizer = AdamW([ParameterGroup((values,))])
        save(folder, TrainState(step), optimizer, identity={}, resumed_from=1)

    big(1)
    big(2)
    with pytest.raises(DiskError, match="No space left on device") as failed:
        big(3)
    assert failed.value.exit_code == 74
    assert "free space" in failed.value.fix
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000001", "step-00000002"]
    assert latest(folder)[0].state.step == 2


def _save_again(folder):
    """Step 1 once more, as a resumed run does after an evaluation that was due."""
    state = TrainState(1, eval_loss=1.0, best_eval_loss=1.0)
    save(folder, state, _optimizer(1), identity={"data": "x"}, resumed_from=1)


def test_a_step_that_is_saved_again_is_never_lost(tmp_path):
    """It is the only checkpoint there is, whether the process dies or the power goes."""
    root = tmp_path / "run"
    root.mkdir()
    disk, num_cuts = Disk(root), 0
    _save(root / "checkpoints", 1)
    disk.flush_all()

    def cut(name, *paths):
        nonlocal num_cuts
        disk(name, *paths)
        target = tmp_path / "left"
        for names in ("flushed", "seen"):
            target.mkdir()
            disk.left_over(target, names=names)
            _assert_restorable(target / "checkpoints", at_least=1)
            shutil.rmtree(target)
        shutil.copytree(root, target)
        _assert_restorable(target / "checkpoints", at_least=1)
        shutil.rmtree(target)
        num_cuts += 1

    with faults_at(cut):
        _save_again(root / "checkpoints")
    assert latest(root / "checkpoints")[0].state.eval_loss == 1.0
    assert sorted(path.name for path in (root / "checkpoints").iterdir()) == ["step-00000001"]
    assert num_cuts > 10


def test_a_full_disk_leaves_a_step_that_is_saved_again(tmp_path):
    points = []
    _save(tmp_path / "measure", 1)
    with faults_at(lambda name, *paths: points.append(name)):
        _save_again(tmp_path / "measure")
    for number, point in enumerate(points):
        if not point.startswith("disk."):
            continue
        folder, count = tmp_path / str(number), iter(range(len(points) + 20))
        _save(folder, 1)

        def fail(name, *paths, count=count, number=number):
            if next(count) == number:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with faults_at(fail), pytest.raises(DiskError):
            _save_again(folder)
        _assert_restorable(folder, at_least=1)
