"""One run at a time in a folder: a lock that dies with its process, and who holds it.

    RUN/.lock     locked while a run lives; one line of JSON says whose it is

Where the file system has no locks, the line alone decides: an owner that is gone from this machine,
or was here before it was started again, is taken over.
"""

import errno
import fcntl
import json
import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from nibble.disk import disk_errors
from nibble.errors import FolderInUseError

LOCK_FILE = ".lock"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
# What a file system without locks answers.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
# A winner writes its line right after it has won.
_WAIT_SECONDS = 0.3
_SETTLE_SECONDS = 0.05
_LONGEST_LINE = 4096
_FLAGS = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)


@dataclass(frozen=True)
class Owner:
    """A process: its number, machine, the start of that, when it took the folder, a mark of it."""

    pid: int
    host: str
    boot_id: str
    since: str
    mark: str

    @staticmethod
    def here() -> "Owner":
        """This process, now."""
        since, mark = time.strftime("%F %T%z"), secrets.token_hex(8)
        return Owner(os.getpid(), socket.gethostname(), _boot_id(), since, mark)

    @property
    def is_gone(self) -> bool:
        """Whether the process cannot be alive; of another machine nobody knows."""
        if self.host != socket.gethostname():
            return False
        return self.boot_id != _boot_id() or not _is_alive(self.pid)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Make the folder if need be, and hold it against other runs within the block.

    A folder that was made for this, and in which nothing was put, is gone afterwards.

    Raises:
        FolderInUseError: If another run holds it; says which.
        DiskError: If it cannot be made.
    """
    is_new = not folder.exists()
    with disk_errors(f"cannot use the output folder {folder}"):
        file = _locked(folder)
    try:
        yield
    finally:
        with file, suppress(OSError):
            if is_new and [path.name for path in folder.iterdir()] == [LOCK_FILE]:
                (folder / LOCK_FILE).unlink()
                folder.rmdir()
            else:
                _write_line(file, None)


def is_held(folder: Path) -> bool:
    """Whether a process holds the folder."""
    if not (folder / LOCK_FILE).is_file():
        return False
    try:
        with held(folder):
            return False
    except FolderInUseError:
        return True


def _locked(folder: Path) -> BinaryIO:
    """The lock file, locked and with our line; the one that the name stands for by then."""
    path = folder / LOCK_FILE
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            file = os.fdopen(os.open(path, _FLAGS, 0o644), "r+b", 0)
        except FileNotFoundError:
            continue  # whoever made the folder has just taken it away
        try:
            _lock(file, folder)
            # Whoever held it may have deleted it meanwhile, and somebody made another.
            if _is_named(file, path):
                return file
        except BaseException:
            file.close()
            raise
        file.close()


def _lock(file: BinaryIO, folder: Path) -> None:
    """Lock the file and write our line."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _in_use(folder, _owner_soon(file)) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        _take_by_line(file, folder)
    else:
        _write_line(file, Owner.here())


def _take_by_line(file: BinaryIO, folder: Path) -> None:
    """Where there are no locks: of several that write their line at once, the last one wins."""
    owner, me = _read_line(file), Owner.here()
    if owner is None or owner.is_gone:
        _write_line(file, me)
        time.sleep(_SETTLE_SECONDS)
        owner = _read_line(file)
    if owner != me:
        raise _in_use(folder, owner, f"; if that is no run any more, delete {folder / LOCK_FILE}")


def _in_use(folder: Path, owner: Owner | None, more: str = "") -> FolderInUseError:
    who = "another process"
    if owner is not None:
        who = f"process {owner.pid} on {owner.host} since {owner.since}"
    return FolderInUseError(
        f"{folder} is in use by {who}", fix=f"wait for it, or choose another --out{more}"
    )


def _owner_soon(file: BinaryIO) -> Owner | None:
    """Who holds the lock; its line may come a moment after the lock."""
    give_up = time.monotonic() + _WAIT_SECONDS
    while True:
        owner = _read_line(file)
        if (owner is not None and not owner.is_gone) or time.monotonic() > give_up:
            return owner
        time.sleep(0.01)


def _read_line(file: BinaryIO) -> Owner | None:
    file.seek(0)
    try:
        values: Any = json.loads(file.read(_LONGEST_LINE))
        owner = Owner(**values)
    except (ValueError, TypeError):
        return None
    return owner if isinstance(owner.pid, int) and owner.pid > 0 else None


def _write_line(file: BinaryIO, owner: Owner | None) -> None:
    line = b"" if owner is None else (json.dumps(asdict(owner)) + "\n").encode()
    file.seek(0)
    file.write(line)
    file.truncate(len(line))


def _is_named(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _boot_id() -> str:
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""
