"""The figures of a run: everything a report says of it, off its own events.

events.jsonl, plan.json, run.yaml, manifest.json, the record -> RunFigures
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from nibble.events import (
    EvalEnd,
    Event,
    LoadEnd,
    RunEnd,
    RunStart,
    StepEnd,
    WarningRaised,
    last_attempts,
)
from nibble.events import read_events as read_all
from nibble.experiment.compare import Record, run_name
from nibble.train import folder
from nibble.train.manifest import read_manifest


@dataclass(frozen=True)
class RunFigures:
    """What a finished run took and gave.

    Attributes:
        values: By the key of a criterion; see `CRITERIA`.
        losses: By step, in nats per target token of the step.
        held_out: By step, in nats per target token.
        warnings: Those it met, each once.
        parts: Bytes at the predicted peak by what they are for; empty without a plan.
        settings: What the plan chose for it.
        made_of: Names and digests of what it was made of and where it ran.
        start: How large it was.
    """

    method: str
    seed: int
    values: dict[str, float]
    losses: dict[int, float]
    held_out: dict[int, float]
    warnings: tuple[str, ...]
    parts: dict[str, int]
    settings: dict[str, Any]
    made_of: dict[str, str]
    start: RunStart


def read_runs(place: Path, records: Mapping[tuple[str, int], Record]) -> list[RunFigures]:
    """The figures of the finished runs in the folder of a comparison."""
    return [
        _read_run(place, method, seed, record)
        for (method, seed), record in records.items()
        if record.is_finished
    ]


def _read_run(place: Path, method: str, seed: int, record: Record) -> RunFigures:
    out = place / run_name(method, seed)
    events = list(read_all(out / folder.EVENTS_FILE))
    end = folder.last_end(out)
    assert end is not None, "the run is finished"
    standing = last_attempts(events, max(e.step for e in events if isinstance(e, StepEnd)))
    steps = [event for event in standing if isinstance(event, StepEnd)]
    evals = [event for event in standing if isinstance(event, EvalEnd)]
    plan = folder.read_plan(out)
    identity, environment = read_manifest(out)
    same = ("base", "data", "tokenizer", "template")
    return RunFigures(
        method=method,
        seed=seed,
        values={
            **_size_values(events, end),
            **_time_values(events, steps, end, record),
            **_loss_values(evals),
            **_measured_values(record.measured),
        },
        losses={event.step: event.loss for event in steps},
        held_out={event.step: event.loss for event in evals},
        warnings=tuple(dict.fromkeys(e.message for e in events if isinstance(e, WarningRaised))),
        parts=dict(plan.get("parts", {})),
        settings=dict(plan.get("settings", {})),
        made_of={**{key: identity.get(key, "") for key in same}, **environment},
        start=[event for event in events if isinstance(event, RunStart)][-1],
    )


def _size_values(events: list[Event], end: RunEnd) -> dict[str, float]:
    load = [event for event in events if isinstance(event, LoadEnd)][-1]
    adapters = sum(size for kind, size in load.resident_bytes.items() if "adapter" in kind)
    base = load.total_bytes - adapters
    values: dict[str, float] = {
        "base_bytes": base,
        "saved_bytes": end.adapter_bytes,
        "saved_share": end.adapter_bytes / base,
        "trained_values": load.num_trainable,
        # A run that was continued has a peak in each of its processes.
        "peak_memory_bytes": max(
            event.peak_memory_bytes for event in events if isinstance(event, StepEnd | RunEnd)
        ),
    }
    if end.predicted_peak_memory_bytes is not None:
        values["predicted_peak_memory_bytes"] = end.predicted_peak_memory_bytes
    return values


def _time_values(
    events: list[Event], steps: list[StepEnd], end: RunEnd, record: Record
) -> dict[str, float]:
    load = [event for event in events if isinstance(event, LoadEnd)][-1]
    values = {
        "setup_seconds": load.seconds,
        "step_seconds": median(event.seconds for event in steps),
        "train_seconds": end.seconds,
        "tokens_per_s": end.tokens / max(end.seconds, 1e-9),
    }
    if record.seconds is not None:
        values["total_seconds"] = record.seconds
    return values


def _loss_values(evals: list[EvalEnd]) -> dict[str, float]:
    if not evals:
        return {}
    first, last = evals[0], evals[-1]
    before = {"eval_loss_before": first.loss, "token_accuracy_before": first.token_accuracy}
    after = {"eval_loss": last.loss, "token_accuracy": last.token_accuracy}
    return {**before, **after} if first.step == 0 else after


def _measured_values(measured: dict[str, Any]) -> dict[str, float]:
    if not measured:
        return {}
    before, after = measured["general_before"], measured["general_after"]
    values = {
        "general_loss_before": before,
        "general_loss": after,
        "forgetting": after - before,
    }
    if measured["num_short"]:
        values["exact_match"] = measured["num_exact"] / measured["num_short"]
    return values
