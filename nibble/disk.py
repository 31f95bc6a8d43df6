"""Files that survive a crash, and the named points at which one may happen.

    make_folder    a folder                           disk.before_make
    write_file     a new file, flushed to the disk    disk.before_write, disk.before_fsync
    rename         a file or folder                   disk.before_rename
    sync_folder    the names in a folder              disk.before_sync
    remove         a file, or a folder and all in it  disk.before_remove
    replace_file   write_file beside the old one, rename, sync_folder

After a power cut the disk holds what was flushed: the bytes of a file after `write_file`, its name
after `sync_folder`. `fault` does nothing until a hook is set, which may raise or end the process.
"""

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from nibble.errors import DiskError

FAULT_POINTS = (
    "disk.before_make",
    "disk.before_write",
    "disk.before_fsync",
    "disk.before_rename",
    "disk.before_sync",
    "disk.before_remove",
    "train.after_step",
    "train.before_finish",
    "checkpoint.before_save",
    "checkpoint.after_write",
    "checkpoint.after_rename",
    "checkpoint.after_prune",
    "adapter.after_write",
)
_FULL = (errno.ENOSPC, errno.EDQUOT)
# What a file system answers that flushes no folders, as some network disks.
_NO_FLUSH = (errno.EINVAL, errno.EBADF)

FaultHook = Callable[..., None]
_hook: FaultHook | None = None


def fault(name: str, *paths: Path) -> None:
    """A point at which a test may let the disk fail or the process die."""
    if _hook is not None:
        _hook(name, *paths)


@contextmanager
def faults_at(hook: FaultHook) -> Iterator[None]:
    """Within the block, `hook(name, *paths)` is called at every fault point."""
    global _hook
    before, _hook = _hook, hook
    try:
        yield
    finally:
        _hook = before


@contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Within the block, an error of the operating system becomes a DiskError about `what`."""
    try:
        yield
    except OSError as error:
        fix = "check that the disk is there and that you may write to it"
        if error.errno in _FULL:
            fix = "free space on the disk; nothing that was saved is lost, so run it again then"
        where = f" ({error.filename})" if error.filename else ""
        raise DiskError(f"{what}: {error.strerror or error}{where}", fix=fix) from None


def make_folder(path: Path) -> None:
    """Make a folder that is not there yet, and those above it, whose names are flushed."""
    if not path.parent.is_dir():
        make_folder(path.parent)
        sync_folder(path.parent.parent)
    fault("disk.before_make", path)
    path.mkdir()


def write_file(path: Path, pieces: Iterable[bytes | memoryview]) -> str:
    """Write a new file piece by piece and flush it to the disk; returns its SHA-256."""
    digest = hashlib.sha256()
    with path.open("xb", buffering=0) as file:
        for piece in pieces:
            write_piece(file.fileno(), path, piece)
            digest.update(piece)
        flush_file(file.fileno(), path)
    return digest.hexdigest()


def write_piece(descriptor: int, path: Path, piece: bytes | memoryview) -> None:
    """Write to an open file where it stands."""
    fault("disk.before_write", path)
    _write_all(descriptor, memoryview(piece).cast("B"))


def flush_file(descriptor: int, path: Path) -> None:
    """Flush an open file to the disk."""
    fault("disk.before_fsync", path)
    os.fsync(descriptor)


def replace_file(path: Path, *pieces: bytes | memoryview) -> None:
    """Put a file in the place of an old one, which stays whole until the new one is."""
    temporary = path.with_name(f".{path.name}.tmp")
    remove(temporary)
    try:
        write_file(temporary, pieces)
        rename(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def rename(source: Path, target: Path) -> None:
    """Give a file or folder another name; a file that has it is replaced."""
    fault("disk.before_rename", source, target)
    source.rename(target)


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk, where its file system can."""
    fault("disk.before_sync", folder)
    try:
        _flush(folder)
    except OSError as error:
        if error.errno not in _NO_FLUSH:
            raise


def sync_tree(folder: Path) -> None:
    """Flush all files of a folder that others have written, and their names."""
    for path in sorted(folder.rglob("*")):
        _flush(path)
    sync_folder(folder)


def remove(path: Path) -> None:
    """Remove a file, or a folder and all in it; nothing where there is none."""
    if not path.is_symlink() and not path.exists():
        return
    fault("disk.before_remove", path)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
