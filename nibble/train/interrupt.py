"""The end of a run that comes from outside: a signal.

before the loop     any signal ends the run at once
in the loop         the first lets the step at work be finished and saved; a second ends at once
the same soon       counts once: a scheduler reaches a rank directly and by its launcher, and
                    other ranks may have said it already; two Ctrl-C are two
any but SIGINT      the process also ends by itself once the time to save is over
SIGHUP              counts unless it is ignored, as under nohup
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from nibble.errors import NibbleError, RunInterrupted, StoppedError

Item = TypeVar("Item")
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_ECHO_SECONDS = 5


class Asked(Exception):  # noqa: N818
    """The run was asked to stop in the middle of something that can be done again."""


class StopSignal:
    """What was asked of a run.

    Attributes:
        name: The signal that asked this process to stop, or nothing.
        agree: Gives the largest of all ranks' numbers; one process is asked alone.
        standing: What stands of the run, for a person; the run keeps it up to date.
    """

    def __init__(self) -> None:
        self.name = ""
        self.agree: Callable[[float], float] = lambda number: number
        self.standing = "nothing was trained this time"
        self._is_patient = False
        self._within_seconds: float | None = None
        self._echo_until = 0.0
        self._timer: threading.Timer | None = None

    @contextmanager
    def patience(self, within_seconds: float | None = None) -> Iterator[None]:
        """Within the block the first signal waits for what is at work, so long at most."""
        self._is_patient, self._within_seconds = True, within_seconds
        try:
            yield
        finally:
            self._is_patient = False

    def asked(self) -> bool:
        """Whether the run is to stop; every rank asks at the same places and hears the same."""
        number = signal.Signals[self.name].value if self.name else 0
        agreed = int(self.agree(number))
        if agreed != number:
            self.name = signal.Signals(agreed).name
            self._echo_until = time.monotonic() + _ECHO_SECONDS
        return bool(agreed)

    def until_asked(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items; raises Asked instead of the next one once the run is asked to stop."""
        for item in items:
            if self.asked():
                raise Asked
            yield item

    def error(self) -> NibbleError:
        """What the run ends with, once it was asked to."""
        kind = RunInterrupted if self.name in ("", "SIGINT") else StoppedError
        return kind(
            f"stopped by {self.name or 'SIGINT'}; {self.standing}",
            fix="run the same command again to continue",
        )

    def _handle(self, number: int, frame: object) -> None:
        name = signal.Signals(number).name
        is_echo = name == self.name and time.monotonic() < self._echo_until
        is_first, self.name = not self.name, name
        if is_first and number != signal.SIGINT:
            self._echo_until = time.monotonic() + _ECHO_SECONDS
        if not (is_echo or (is_first and self._is_patient)):
            raise KeyboardInterrupt
        if number != signal.SIGINT and self._within_seconds is not None and self._timer is None:
            self._timer = threading.Timer(self._within_seconds, self._give_up)
            self._timer.daemon = True
            self._timer.start()

    def close(self) -> None:
        """The run is over, in time."""
        if self._timer is not None:
            self._timer.cancel()

    def _give_up(self) -> None:
        print(f"nibble: the step took too long to finish; {self.standing}", file=sys.stderr)  # noqa: T201
        sys.stderr.flush()
        os._exit(StoppedError.exit_code)


@contextmanager
def stop_signals() -> Iterator[StopSignal]:
    """Within the block SIGINT, SIGTERM, SIGUSR1 and SIGHUP stop the run in order.

    Raises:
        RunInterrupted: After SIGINT.
        StoppedError: After another of them.
    """
    stop, previous = StopSignal(), dict[int, Any]()
    try:
        for number in _SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            previous[number] = signal.signal(number, stop._handle)
    except ValueError:  # not the main thread: the caller handles signals
        previous.clear()
    try:
        yield stop
    except KeyboardInterrupt:
        raise stop.error() from None
    finally:
        stop.close()
        for number, handler in previous.items():
            signal.signal(number, handler)
