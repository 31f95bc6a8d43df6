"""Every event of a run goes to its log, to its table of metrics, and to whoever listens."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from nibble.errors import NibbleError
from nibble.events import Emit, Event, EventLog, MetricsTable, RunEnd, StepEnd


@dataclass
class Reporter:
    """Hands events on, in order, and keeps count for the last of them.

    Args:
        log: The truth about the run; None of a rank that does not write.
        emit: Who listens.
        table: What becomes of steps and evaluations; none before it is known which of them stand.
        seconds: Time of all steps.
        tokens: Tokens of all steps.
        peak_memory_bytes: The highest of all steps.
    """

    log: EventLog | None
    emit: Emit
    table: MetricsTable | None = None
    seconds: float = 0.0
    tokens: int = 0
    peak_memory_bytes: int = 0

    def __call__(self, event: Event) -> None:
        if isinstance(event, StepEnd):
            self.seconds += event.seconds
            self.tokens += event.tokens
            self.peak_memory_bytes = event.peak_memory_bytes
        if self.log is None:
            return
        self.log(event)
        if self.table is not None:
            self.table(event)
        try:
            self.emit(event)
        except OSError as error:
            # Not of the run's disk: that would be told to free space.
            raise RuntimeError(f"who listens to the run failed: {error}") from error

    def sync(self) -> None:
        """Flush what was reported to the disk."""
        if self.log is not None:
            self.log.sync()

    @contextmanager
    def end_told(self) -> Iterator[None]:
        """An error that ends the run within the block is the last thing in its log."""
        try:
            yield
        except NibbleError as error:
            with suppress(OSError):
                self(
                    RunEnd(
                        error.what.splitlines()[0],
                        self.seconds,
                        self.tokens,
                        self.peak_memory_bytes,
                    )
                )
            raise
