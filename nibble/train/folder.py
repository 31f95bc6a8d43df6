"""The folder of a run: whose it is, what it holds, whether it is finished."""

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nibble import yamlfile
from nibble.config import RunConfig, load_config
from nibble.errors import DiskError, FolderInUseError
from nibble.events import METRICS_COLUMNS, RunEnd, read_events

RUN_FILE = "run.yaml"
PLAN_FILE = "plan.json"
EVENTS_FILE = "events.jsonl"
METRICS_FILE = "metrics.csv"
LOCK_FILE = ".lock"
CHECKPOINTS = "checkpoints"
FINISHED = "finished"


def folder_of(run: RunConfig) -> Path:
    """`run.out`, or runs/<model>-<method>."""
    if run.out:
        return Path(run.out)
    return Path("runs") / f"{Path(run.model.name).name or 'model'}-{run.method}"


@contextmanager
def run_folder(run: RunConfig) -> Iterator[Path]:
    """Make or enter the folder of a run, and hold it against other runs meanwhile.

    Raises:
        FolderInUseError: If the folder holds something else, another config, or a live run.
        DiskError: If it cannot be made.
    """
    folder = folder_of(run)
    _check_content(folder, run)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK_FILE).open("a+")
    except OSError as error:
        raise DiskError(f"cannot make the output folder {folder}: {error.strerror}") from None
    with lock:
        _lock(lock, folder)
        (folder / RUN_FILE).write_text(run_text(run), encoding="utf-8")
        yield folder


def read_run(folder: Path) -> RunConfig | None:
    """The config that a run folder was made with, origins included; None where there is none."""
    path = folder / RUN_FILE
    if not path.is_file():
        return None
    run = load_config(path)
    _, lines = yamlfile.read(path)
    text = path.read_text(encoding="utf-8").splitlines()
    origins = {key: text[line - 1].rpartition("# ")[2] for key, line in lines.items()}
    run._origins.update({key: origin for key, origin in origins.items() if key in run.flat()})
    return run


def record_plan(folder: Path, plan: Mapping[str, Any] | None) -> dict[str, Any]:
    """Write what was planned; without a plan, give the one that stands."""
    if plan is None:
        return read_plan(folder)
    text = json.dumps({"version": 1, **plan}, indent=2, ensure_ascii=False)
    (folder / PLAN_FILE).write_text(text + "\n", encoding="utf-8")
    return dict(plan)


def read_plan(folder: Path) -> dict[str, Any]:
    """What was planned for the run; empty where nothing was, or it cannot be read."""
    try:
        plan = json.loads((folder / PLAN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return plan if isinstance(plan, dict) and _is_usable(plan) else {}


def _is_usable(plan: dict[str, Any]) -> bool:
    """Whether a plan has what a run reads of it."""
    numbers = ("peak_memory_bytes", "uncorrected_peak_memory_bytes", "budget_bytes")
    has_numbers = all(isinstance(plan.get(key), int) and plan[key] > 0 for key in numbers)
    has_parts = isinstance(plan.get("parts"), dict) and isinstance(plan.get("reasons"), list)
    return has_numbers and has_parts and isinstance(plan.get("device"), str)


def is_finished(folder: Path) -> bool:
    """Whether the last thing the run said is that it is finished."""
    end = last_end(folder)
    return end is not None and end.reason == FINISHED


def last_end(folder: Path) -> RunEnd | None:
    """The last `run_end` of the log, or None."""
    path = folder / EVENTS_FILE
    ends = [e for e in read_events(path) if isinstance(e, RunEnd)] if path.is_file() else []
    return ends[-1] if ends else None


def run_text(run: RunConfig) -> str:
    """The config as YAML with the origin of every value as a comment.

    The text is a config file: `nibble train run.yaml` repeats the run.
    """
    lines: list[str] = []
    section = ""
    for key, value in run.flat().items():
        head, _, tail = key.rpartition(".")
        if head != section:
            lines.append(f"{head}:")
            section = head
        indent = "  " if head else ""
        lines.append(f"{indent}{tail}: {json.dumps(value)}  # {run.origin(key)}")
    return "\n".join(lines) + "\n"


def forget_metrics_after(folder: Path, step: int) -> None:
    """Drop the rows of metrics.csv that a resumed run will write again."""
    path = folder / METRICS_FILE
    if not path.is_file():
        return
    header, *rows = path.read_text(encoding="utf-8").splitlines()
    kept = [row for row in rows if row.split(",")[0].isdigit() and int(row.split(",")[0]) <= step]
    if header.split(",") == list(METRICS_COLUMNS):
        path.write_text("\n".join([header, *kept]) + "\n", encoding="utf-8")


def changed_keys(old: RunConfig, new: RunConfig) -> dict[str, tuple[Any, Any]]:
    """The dotted keys whose values differ, old and new; the folder itself does not count."""
    before, after = old.flat(), new.flat()
    return {k: (before[k], after[k]) for k in after if k != "out" and before[k] != after[k]}


def _check_content(folder: Path, run: RunConfig) -> None:
    if folder.is_file():
        raise FolderInUseError(f"{folder} is a file", fix="choose another --out")
    names = {path.name for path in folder.iterdir()} - {LOCK_FILE} if folder.is_dir() else set()
    old = read_run(folder)
    if names and old is None:
        raise FolderInUseError(
            f"{folder} holds something else ({', '.join(sorted(names)[:3])})",
            fix="choose another --out or empty the folder",
        )
    changed = changed_keys(old, run) if old is not None else {}
    # Before its first checkpoint a run has nothing to lose: a wrong path can be corrected.
    if changed and (CHECKPOINTS in names or is_finished(folder)):
        listed = ", ".join(f"{key}: {a!r} -> {b!r}" for key, (a, b) in list(changed.items())[:5])
        raise FolderInUseError(
            f"{folder} holds a run with another config ({listed})",
            fix="choose another --out, or run with the config of its run.yaml",
        )


def _lock(lock: Any, folder: Path) -> None:
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.seek(0)
        owner = lock.read().strip() or "another process"
        raise FolderInUseError(
            f"{folder} is in use by {owner}", fix="wait for it, or choose another --out"
        ) from None
    lock.truncate(0)
    lock.write(f"process {os.getpid()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
    lock.flush()
