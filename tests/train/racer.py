"""One of two processes that take the same folder again and again; see test_owner.py.

Its globals `folder`, `start`, `queue`, `num_races` and `has_locks` come from the test.
"""

import errno
import os
import time

from nibble.errors import FolderInUseError
from nibble.train.owner import held


def without_locks(file, operation):
    raise OSError(errno.ENOLCK, "No locks available")


if not has_locks:  # noqa: F821
    import fcntl

    fcntl.flock = without_locks
for race in range(num_races):  # noqa: F821
    start.wait()  # noqa: F821
    began = time.monotonic()
    result = {"race": race, "pid": os.getpid(), "error": None}
    try:
        with held(folder / str(race)):  # noqa: F821
            start.wait()  # noqa: F821
    except FolderInUseError as error:
        result.update(error=error.what, exit_code=error.exit_code)
        result["seconds"] = time.monotonic() - began
        start.wait()  # noqa: F821
    queue.put(result)  # noqa: F821
