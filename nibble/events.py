"""What a run reports, and the append-only log of it.

Every event is one JSON object a line: {"event": name, "time": seconds since 1970, ...}.
The log is the truth about a run: a bar, a table, a page are views of it.
"""

import csv
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import InitVar, asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin


@dataclass(frozen=True)
class RunStart:
    """A run begins or goes on: its method, device, versions and size.

    `changed` names what it goes on with that is not as it was, as in the manifest of the run.
    """

    method: str
    model: str
    device: str
    steps: int
    steps_done: int
    num_train_rows: int
    num_eval_rows: int
    versions: dict[str, str]
    num_threads: int
    changed: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class PlanMade:
    """The settings chosen for `auto` values, each with its reason."""

    settings: dict[str, Any]
    reasons: list[str]


@dataclass(frozen=True)
class LoadEnd:
    """The base and its adapters are resident: bytes per storage, and counts of values."""

    resident_bytes: dict[str, int]
    total_bytes: int
    num_trainable: int
    num_total: int
    seconds: float


@dataclass(frozen=True)
class StepEnd:
    """One optimizer step: loss is the mean over its target tokens, in nats."""

    step: int
    loss: float
    num_target_tokens: int
    tokens: int
    learning_rate: float
    grad_norm: float
    seconds: float
    tokens_per_s: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class EvalEnd:
    """Held-out loss in nats per target token; step 0 is before training."""

    step: int
    loss: float
    perplexity: float
    token_accuracy: float
    num_target_tokens: int
    seconds: float = 0.0


@dataclass(frozen=True)
class CheckpointSaved:
    """A complete state stands on disk."""

    step: int
    folder: str
    seconds: float


@dataclass(frozen=True)
class PagesMoved:
    """Pages of a paged optimizer that were copied so far, and the time steps waited for them."""

    step: int
    pages_in: int
    pages_out: int
    bytes_moved: int
    stall_seconds: float


@dataclass(frozen=True)
class WarningRaised:
    """Something a person should know that does not stop the run."""

    message: str


@dataclass(frozen=True)
class RunEnd:
    """The run is over: why, how long, how large."""

    reason: str
    seconds: float
    tokens: int
    peak_memory_bytes: int
    predicted_peak_memory_bytes: int | None = None
    adapter: str = ""
    adapter_bytes: int = 0
    adapter_sha256: dict[str, str] = field(default_factory=dict)


Event = (
    RunStart
    | PlanMade
    | LoadEnd
    | StepEnd
    | EvalEnd
    | CheckpointSaved
    | PagesMoved
    | WarningRaised
    | RunEnd
)
Emit = Callable[[Event], None]

_SPECIAL_NAMES = {"PlanMade": "plan", "CheckpointSaved": "checkpoint", "WarningRaised": "warning"}
EVENT_TYPES: tuple[type[Event], ...] = get_args(Event)


def event_name(event: Event | type) -> str:
    """The name in the log.

    >>> event_name(LoadEnd)
    'load_end'
    """
    kind = event if isinstance(event, type) else type(event)
    if kind.__name__ in _SPECIAL_NAMES:
        return _SPECIAL_NAMES[kind.__name__]
    if kind in (StepEnd, EvalEnd):
        return kind.__name__.removesuffix("End").lower()
    return re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).lower()


_BY_NAME = {event_name(kind): kind for kind in EVENT_TYPES}


def _classes(annotation: Any) -> tuple[type, ...]:
    """The classes that a field of an event may have; a whole number is a number."""
    kinds = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    classes = {get_origin(kind) or kind for kind in kinds}
    return (*classes, int) if float in classes else tuple(classes)


_FIELDS = {kind: {item.name: _classes(item.type) for item in fields(kind)} for kind in EVENT_TYPES}


class EventLog:
    """Appends events to a JSONL file; a process that dies loses no line that was appended."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a+b", buffering=0)
        if self._file.tell():
            self._file.seek(-1, os.SEEK_END)
            if self._file.read(1) != b"\n":
                self._file.write(b"\n")  # what a crash tore stays a line of its own

    def __call__(self, event: Event) -> None:
        record = {"event": event_name(event), "time": time.time(), **asdict(event)}
        self._file.write((json.dumps(record, ensure_ascii=False) + "\n").encode())

    def sync(self) -> None:
        """Flush all lines to the disk, so that they outlive a power cut."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_events(path: Path) -> Iterator[Event]:
    """The events of a log; torn lines, unknown events and wrong values are passed over."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            event = parse_event(line)
            if event is not None:
                yield event


def parse_event(line: str) -> Event | None:
    """The event in a line of a log; None where it is torn, unknown or has wrong values."""
    try:
        record = json.loads(line)
        kind = _BY_NAME[record["event"]]
        known = _FIELDS[kind]
        values = {key: value for key, value in record.items() if key in known}
        event = kind(**values)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    is_right = all(type(value) in known[key] for key, value in values.items())
    return event if is_right else None


METRICS_COLUMNS: tuple[str, ...] = (
    "step",
    "train_loss",
    "learning_rate",
    "grad_norm",
    "tokens",
    "tokens_per_s",
    "peak_memory_bytes",
    "eval_loss",
)


def last_attempts(events: Iterable[Event], step: int) -> list[StepEnd | EvalEnd]:
    """Steps and evaluations up to `step`, each as it was when it was last taken, in order."""
    found: dict[tuple[int, type], StepEnd | EvalEnd] = {}
    for event in events:
        if isinstance(event, StepEnd | EvalEnd) and event.step <= step:
            found[event.step, type(event)] = event
    return [found[key] for key in sorted(found, key=lambda key: (key[0], key[1] is EvalEnd))]


@dataclass
class MetricsTable:
    """metrics.csv: one row a step, with the held-out loss where it was measured.

    Args:
        path: Where it is written, anew.
        events: Those of the steps that stand already.
    """

    path: Path
    events: InitVar[Iterable[Event]] = ()
    _pending: dict[str, Any] = field(default_factory=dict)
    _tokens: int = 0

    def __post_init__(self, events: Iterable[Event]) -> None:
        with self._writer("w") as writer:
            writer.writeheader()
            writer.writerows(row for event in events for row in self._completed_by(event))

    def __call__(self, event: Event) -> None:
        rows = self._completed_by(event)
        if rows:
            with self._writer("a") as writer:
                writer.writerows(rows)

    @contextmanager
    def _writer(self, mode: str) -> Iterator[csv.DictWriter]:
        with self.path.open(mode, newline="", encoding="utf-8") as file:
            yield csv.DictWriter(file, METRICS_COLUMNS)

    def _completed_by(self, event: Event) -> list[dict[str, Any]]:
        """The row that nothing is added to any more, if there is one."""
        completed = self._pending
        if isinstance(event, StepEnd):
            self._tokens += event.tokens
            self._pending = {
                "step": event.step,
                "train_loss": event.loss,
                "learning_rate": event.learning_rate,
                "grad_norm": event.grad_norm,
                "tokens": self._tokens,
                "tokens_per_s": event.tokens_per_s,
                "peak_memory_bytes": event.peak_memory_bytes,
            }
        elif isinstance(event, EvalEnd):
            if self._pending.get("step") != event.step:
                self._pending = {"step": event.step}
            self._pending["eval_loss"] = event.loss
        elif isinstance(event, RunEnd):
            self._pending = {}
        return [completed] if completed and completed is not self._pending else []
