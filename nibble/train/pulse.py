"""Whether the other ranks of a run are alive: every rank says so each second and listens to one.

    rank 0 listens to rank 1, rank 1 to rank 2, ..., the last to rank 0

A rank that ends says so first, with its reason. One that says nothing any more, or whose machine
cannot be reached, is given up: this process ends as well and leaves a run that can be continued.
"""

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from nibble.errors import StoppedError

BEAT_SECONDS = 1.0
# A rank is given up after so much silence; what it leaves waiting ends so much later at most.
SILENCE_SECONDS = 12.0
GRACE_SECONDS = 6.0
_ENDED = "ended"


def _leave(reason: str) -> None:
    print(f"nibble: {reason}; run the same command again to continue", file=sys.stderr)  # noqa: T201
    sys.stderr.flush()
    os._exit(StoppedError.exit_code)


class Pulse:
    """The beat of this rank, in a thread of its own, and what it hears of the others.

    Args:
        store: Key and value of all ranks; `set`, `get` and `check`, of nobody else's use.
        rank: Of this process.
        world_size: Number of processes, at least 2.
        leave: Called with a reason where another rank is lost and this one hangs.

    Attributes:
        lost: Why the run cannot go on; empty as long as it can.
    """

    def __init__(
        self, store: Any, rank: int, world_size: int, *, leave: Callable[[str], None] = _leave
    ) -> None:
        self.lost = ""
        self._store, self._rank, self._leave = store, rank, leave
        self._other = (rank + 1) % world_size
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)

    def start(self) -> None:
        """Begin to say that this rank is alive."""
        self._thread.start()

    def tell(self, reason: str) -> None:
        """Let the other ranks know why this one ends; the first reason stands."""
        with suppress(RuntimeError):
            self._store.compare_set(_ENDED, "", reason or "it ended")

    def stop(self) -> None:
        """Be silent from here on, and listen no more."""
        self._over.set()
        self._thread.join()

    def reason(self, within_seconds: float) -> str:
        """Why the run cannot go on, once it is known; nothing where it is not in time."""
        give_up = time.monotonic() + within_seconds
        while not self.lost and time.monotonic() < give_up:
            time.sleep(0.05)
        return self.lost

    def _run(self) -> None:
        count, heard, heard_at = 0, "", time.monotonic()
        while not self._over.wait(BEAT_SECONDS):
            count += 1
            try:
                self._store.set(f"beat/{self._rank}", str(count))
                beat = self._read(f"beat/{self._other}")
                self.lost = self.lost or self._read(_ENDED)
            except RuntimeError:
                self._give_up("the machine of rank 0 cannot be reached")
                return
            if beat != heard:
                heard, heard_at = beat, time.monotonic()
            elif time.monotonic() - heard_at > SILENCE_SECONDS:
                self._give_up(f"rank {self._other} has not been heard of for {SILENCE_SECONDS:g} s")
                return

    def _read(self, key: str) -> str:
        return self._store.get(key).decode() if self._store.check([key]) else ""

    def _give_up(self, reason: str) -> None:
        self.tell(reason)
        self.lost = self.lost or reason
        if not self._over.wait(GRACE_SECONDS):
            self._leave(self.lost)
