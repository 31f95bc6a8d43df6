"""Files that are whole or not there, and the points at which a test may end the world."""

import ast
import errno
import hashlib
from pathlib import Path

import pytest

from nibble import disk
from nibble.errors import DiskError

SOURCES = sorted((Path(__file__).resolve().parents[1] / "nibble").rglob("*.py"))


def test_every_fault_point_is_listed_and_no_other():
    named = [
        node.args[0].value
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "fault"
        if isinstance(node.args[0], ast.Constant) and node.args[0].value in disk.FAULT_POINTS
    ]
    assert sorted(named) == sorted(disk.FAULT_POINTS)


def test_a_written_file_has_its_digest(tmp_path):
    digest = disk.write_file(tmp_path / "a", [b"one", memoryview(b"two")])
    assert (tmp_path / "a").read_bytes() == b"onetwo"
    assert digest == hashlib.sha256(b"onetwo").hexdigest() == disk.file_sha256(tmp_path / "a")
    with pytest.raises(FileExistsError):
        disk.write_file(tmp_path / "a", [b"other"])


@pytest.mark.parametrize("point", ["disk.before_write", "disk.before_fsync", "disk.before_rename"])
def test_a_file_that_cannot_be_replaced_stays(tmp_path, point):
    disk.replace_file(tmp_path / "a", b"old")

    def full(name, *paths):
        if name == point:
            raise OSError(errno.ENOSPC, "No space left on device")

    with (
        disk.faults_at(full),
        pytest.raises(DiskError, match=r"a: No space left on device\n  fix: free space"),
        disk.disk_errors("cannot write a"),
    ):
        disk.replace_file(tmp_path / "a", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_remove_takes_links_for_themselves(tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("x")
    (tmp_path / "link").symlink_to(precious)
    disk.remove(tmp_path / "link")
    disk.remove(tmp_path / "none")
    assert (precious / "file").exists()
    assert not (tmp_path / "link").is_symlink()


def test_errors_that_are_not_of_the_disk_pass():
    with pytest.raises(ValueError, match="x"), disk.disk_errors("cannot write a"):
        raise ValueError("x")
