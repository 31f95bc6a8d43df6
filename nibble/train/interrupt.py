"""The end of a run that comes from outside: a signal."""

import signal
from typing import Any


class StopSignal:
    """Remembers the first SIGINT, SIGTERM or SIGUSR1; the loop asks after every step."""

    def __init__(self) -> None:
        self.name = ""
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            try:
                self._previous[number] = signal.signal(number, self._remember)
            except ValueError:  # not the main thread: the caller handles signals
                return self
        return self

    def __exit__(self, *details: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: object) -> None:
        if self.name:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
