"""What past runs on this machine were planned to take and what they took.

One line of JSON a run in the user's cache folder; nothing leaves the machine.
"""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

FILE_NAME = "plan_history.jsonl"
# Runs on a device before its plans are corrected; the last so many count.
FEWEST_RUNS = 3
MOST_RUNS = 50
# Smaller runs say little: what libraries take weighs more than the run.
SMALLEST_BYTES = 200_000_000


def history_file() -> Path:
    """The file of this user."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "nibble" / FILE_NAME


def record(
    device: str, method: str, model: str, *, predicted: int, measured: int, is_comparable: bool
) -> None:
    """Remember a finished run that was large enough; a cache that takes nothing is passed over.

    Args:
        is_comparable: Whether the run went as planned, from start to end, and what was measured is
            what plans count: later plans are corrected by such runs alone.
    """
    if predicted < SMALLEST_BYTES:
        return
    values = {
        "device": device,
        "method": method,
        "model": model,
        "predicted_bytes": predicted,
        "measured_bytes": measured,
        "is_comparable": is_comparable,
    }
    try:
        path = history_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values, ensure_ascii=False) + "\n")
    except (OSError, RuntimeError):
        return


def read_history() -> list[dict[str, Any]]:
    """Past runs, the oldest first; lines that are none are passed over."""
    try:
        lines = history_file().read_text(encoding="utf-8").splitlines()
    except (OSError, RuntimeError, UnicodeDecodeError):
        return []
    return [found for line in lines if (found := _parsed(line)) is not None]


def summary(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Per device the median of measured over predicted, where enough runs are comparable."""
    ratios: dict[str, list[float]] = {}
    for entry in records:
        if not entry["is_comparable"]:
            continue
        ratio = entry["measured_bytes"] / entry["predicted_bytes"]
        ratios.setdefault(entry["device"], []).append(ratio)
    return {
        device: median(found[-MOST_RUNS:])
        for device, found in ratios.items()
        if len(found) >= FEWEST_RUNS
    }


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
        sizes = (entry["predicted_bytes"], entry["measured_bytes"])
        is_whole = all(size > 0 and math.isfinite(size) for size in sizes)
        is_named = all(isinstance(entry[key], str) for key in ("device", "method", "model"))
        is_named = is_named and isinstance(entry["is_comparable"], bool)
    except (ValueError, KeyError, TypeError):
        return None
    return entry if is_whole and is_named else None
