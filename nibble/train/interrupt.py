"""Ends of a run that come from outside: a signal, or a full device."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from nibble.errors import OutOfMemoryError


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


@contextmanager
def out_of_memory_named() -> Iterator[None]:
    """Within the block, torch's error becomes ours, with the ways out of it."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(
            f"the device ran out of memory: {str(error).splitlines()[0]}",
            fix="lower train.micro_batch_size or data.max_seq_len, set train.recompute=full, "
            "or use method=qlora",
        ) from None
