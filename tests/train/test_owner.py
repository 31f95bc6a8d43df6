"""One run at a time in a folder; the loser says at once who holds it."""

import errno
import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from nibble.errors import DiskError, FolderInUseError
from nibble.train import owner
from nibble.train.owner import LOCK_FILE, Owner, held, is_held

RACER = Path(__file__).with_name("racer.py")


def _line(folder):
    return json.loads((folder / LOCK_FILE).read_text())


@pytest.fixture
def without_locks(monkeypatch):
    """A file system that has no locks."""
    import fcntl

    def refuse(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_the_line_says_who_holds_it_and_goes_with_it(tmp_path):
    (tmp_path / "run.yaml").write_text("")
    with held(tmp_path):
        assert _line(tmp_path)["pid"] == os.getpid()
        with pytest.raises(FolderInUseError, match=f"in use by process {os.getpid()} on .* since"):
            held(tmp_path).__enter__()
    assert (tmp_path / LOCK_FILE).read_text() == ""
    with held(tmp_path):
        pass


def test_whether_a_folder_is_held(tmp_path):
    assert not is_held(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with held(tmp_path):
        assert is_held(tmp_path)
        assert _line(tmp_path)["pid"] == os.getpid()
    (tmp_path / LOCK_FILE).touch()
    assert not is_held(tmp_path)


def test_a_folder_in_which_nothing_was_put_is_gone(tmp_path):
    with held(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert not (tmp_path / "a" / "b").exists()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="cannot use the output folder"), held(tmp_path / "file/a"):
        pass


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from nibble.train.owner import held\n"
        "with held(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(FolderInUseError, match=f"process {process.pid} on"):
            held(tmp_path).__enter__()
        process.send_signal(signal.SIGKILL)
    assert _line(tmp_path)["pid"] == process.pid
    with held(tmp_path):
        assert _line(tmp_path)["pid"] == os.getpid()


def _write(folder, owner):
    (folder / LOCK_FILE).write_text(json.dumps(asdict(owner)))


def test_without_locks_the_line_decides(tmp_path, without_locks):
    with held(tmp_path), pytest.raises(FolderInUseError, match=r"delete .*\.lock"):
        held(tmp_path).__enter__()
    with held(tmp_path):
        pass


def test_without_locks_an_owner_that_is_gone_is_taken_over(tmp_path, without_locks):
    gone = subprocess.Popen(["true"])
    gone.wait()
    here = Owner.here()
    for dead in (replace(here, pid=gone.pid), replace(here, boot_id="before")):
        _write(tmp_path, dead)
        with held(tmp_path):
            assert _line(tmp_path)["pid"] == os.getpid()


def test_without_locks_nobody_knows_of_another_machine(tmp_path, without_locks):
    _write(tmp_path, replace(Owner.here(), pid=1, host="elsewhere", boot_id="x"))
    with pytest.raises(FolderInUseError, match="process 1 on elsewhere"), held(tmp_path):
        pass


@pytest.mark.parametrize("line", ["", "{", "[]", "7", '{"pid": "x"}', '{"pid": -1}', "\0" * 9000])
def test_a_line_that_says_nothing_is_nobody(tmp_path, line, without_locks):
    (tmp_path / LOCK_FILE).write_text(line)
    with held(tmp_path):
        assert _line(tmp_path)["pid"] == os.getpid()


def test_a_lock_file_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / LOCK_FILE).symlink_to(tmp_path / "precious")
    with pytest.raises(DiskError), held(tmp_path):
        pass
    assert (tmp_path / "precious").read_text() == "precious"


@pytest.mark.torture
@pytest.mark.parametrize("has_locks", [True, False])
def test_of_two_that_race_one_wins(tmp_path, is_torture, has_locks):
    """Two processes take a folder at the same moment; the loser names the winner."""
    num_races = 1000 if is_torture else 50 if has_locks else 20
    context = multiprocessing.get_context("spawn")
    start, queue = context.Barrier(2), context.Queue()
    given = {"folder": tmp_path, "start": start, "queue": queue, "num_races": num_races}
    given["has_locks"] = has_locks
    racers = [
        context.Process(target=runpy.run_path, args=(str(RACER), given), daemon=True)
        for _ in range(2)
    ]
    for racer in racers:
        racer.start()
    results = [queue.get(timeout=60) for _ in range(2 * num_races)]
    for racer in racers:
        racer.join()
    slowest = 0.0
    for race in range(num_races):
        both = [result for result in results if result["race"] == race]
        winners = [result for result in both if result["error"] is None]
        losers = [result for result in both if result["error"] is not None]
        assert (len(winners), len(losers)) == (1, 1), race
        assert f"process {winners[0]['pid']} on" in losers[0]["error"]
        assert losers[0]["exit_code"] == 73
        slowest = max(slowest, losers[0]["seconds"])
    kind = "locks" if has_locks else "lines alone"
    print(f"races with {kind}: {num_races}, one winner each; slowest loser {slowest:.3f} s")
    assert slowest < 1


def test_owners_of_other_users_are_alive(monkeypatch):
    def refuse(pid, signal):
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    assert not Owner.here().is_gone
    monkeypatch.setattr(owner, "_BOOT_ID", Path("/nowhere"))
    assert Owner.here().boot_id == ""
    assert time.strptime(Owner.here().since, "%Y-%m-%d %H:%M:%S%z")
