"""The folder of a run: whose it is, what it holds, whether it is finished."""

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nibble import yamlfile
from nibble.config import RunConfig, load_config
from nibble.disk import disk_errors, replace_file
from nibble.errors import FolderInUseError, UsageError, did_you_mean
from nibble.events import RunEnd, RunStart, read_events
from nibble.train.owner import LOCK_FILE, held

RUN_FILE = "run.yaml"
PLAN_FILE = "plan.json"
EVENTS_FILE = "events.jsonl"
METRICS_FILE = "metrics.csv"
CHECKPOINTS = "checkpoints"
FINISHED = "finished"
# What a run is made of beside its config.
INPUTS = ("base", "data", "rows", "tokenizer", "template")


def folder_of(run: RunConfig) -> Path:
    """`run.out`, or runs/<model>-<method>."""
    if run.out:
        return Path(run.out)
    return Path("runs") / f"{Path(run.model.name).name or 'model'}-{run.method}"


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Make the folder of a run if need be, and hold it against other runs within the block.

    Raises:
        FolderInUseError: If the folder holds something else than a run, or another run holds it.
        DiskError: If it cannot be made.
    """
    with disk_errors(f"cannot use the output folder {folder}"):
        if folder.is_file():
            raise FolderInUseError(f"{folder} is a file", fix="choose another --out")
        names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    # A run.yaml alone may be a config of the user's own; a run holds a lock before it writes one.
    is_run = RUN_FILE in names and not names.isdisjoint({LOCK_FILE, EVENTS_FILE})
    content = names - {LOCK_FILE, f".{RUN_FILE}.tmp"}
    if content and not is_run and {EVENTS_FILE, CHECKPOINTS} <= names:
        raise FolderInUseError(
            f"{folder} holds a run whose {RUN_FILE} is gone",
            fix=f"bring {RUN_FILE} back, or choose another --out",
        )
    if content and not is_run:
        raise FolderInUseError(
            f"{folder} holds something else ({', '.join(sorted(content)[:3])})",
            fix="choose another --out or empty the folder",
        )
    with held(folder):
        yield


def refuse_content(folder: Path) -> None:
    """Refuse a folder that is there and not empty; a lock that was left in it does not count.

    Raises:
        FolderInUseError: If it is so.
        DiskError: If it cannot be read.
    """
    with disk_errors(f"cannot use the output folder {folder}"):
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        if folder.is_file() or any(name != LOCK_FILE for name in names):
            raise FolderInUseError(f"{folder} is not empty", fix="choose another --out")


def has_begun(folder: Path) -> bool:
    """Whether a run has something to lose there: a checkpoint, or what it finished with."""
    return (folder / CHECKPOINTS).is_dir() or is_finished(folder)


def check_changes(run: RunConfig, allow_change: Collection[str] = ()) -> dict[str, tuple[Any, Any]]:
    """The keys that differ from those of the run that stands in the folder; nothing is written.

    Args:
        allow_change: What may differ: dotted keys, or names of `identity_of`.

    Raises:
        UsageError: If `allow_change` has a name that is none of these.
        FolderInUseError: If the folder holds another run.
    """
    _check_names(allow_change, {*run.flat(), *INPUTS})
    folder = folder_of(run)
    old = read_run(folder)
    changed = changed_keys(old, run) if old is not None else {}
    refused = {key: values for key, values in changed.items() if key not in allow_change}
    # Before its first checkpoint a wrong path can be corrected.
    if refused and has_begun(folder):
        listed = ", ".join(f"{k}: {a!r} -> {b!r}" for k, (a, b) in list(refused.items())[:5])
        allowed = " ".join(f"--allow-change {key}" for key in refused)
        raise FolderInUseError(
            f"{folder} holds a run with another config ({listed})",
            fix="choose another --out, run with the config of its run.yaml, or go on with "
            f"the change: {allowed}",
        )
    return changed


def _check_names(given: Collection[str], known: Collection[str]) -> None:
    for name in given:
        if name not in known:
            raise UsageError(
                f"--allow-change {name}: there is no such key",
                fix=did_you_mean(name, known) or f"a key of the config, or {', '.join(INPUTS)}",
            )


def write_run(run: RunConfig) -> None:
    """Write down what is run in its folder, which is held."""
    replace_file(folder_of(run) / RUN_FILE, run_text(run).encode())


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
    replace_file(folder / PLAN_FILE, f"{text}\n".encode())
    return dict(plan)


def read_plan(folder: Path) -> dict[str, Any]:
    """What was planned for the run; empty where nothing was, or it cannot be read."""
    try:
        plan = json.loads((folder / PLAN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return plan if isinstance(plan, dict) and _is_usable(plan) else {}


def _is_usable(plan: dict[str, Any]) -> bool:
    """Whether a plan has what a run reads of it."""
    numbers = ("peak_memory_bytes", "uncorrected_peak_memory_bytes", "budget_bytes")
    has_numbers = all(isinstance(plan.get(key), int) and plan[key] > 0 for key in numbers)
    parts, reasons = plan.get("parts"), plan.get("reasons")
    has_parts = isinstance(parts, dict) and all(isinstance(size, int) for size in parts.values())
    has_reasons = isinstance(reasons, list) and all(isinstance(each, str) for each in reasons)
    return has_numbers and has_parts and has_reasons and isinstance(plan.get("device"), str)


def is_finished(folder: Path) -> bool:
    """Whether the last thing the run said is that it is finished, and what it wrote is there."""
    end = last_end(folder)
    return (
        end is not None and end.reason == FINISHED and all(map(Path.is_file, weights(folder, end)))
    )


def weights(folder: Path, end: RunEnd) -> list[Path]:
    """The files of weights that a finished run wrote; its folder may have been moved since."""
    return [folder / Path(end.adapter).name / name for name in end.adapter_sha256]


def last_end(folder: Path) -> RunEnd | None:
    """How the run ended; None if it has not, or has begun again since.

    An attempt that was refused before it began takes nothing from a run that is finished.
    """
    path = folder / EVENTS_FILE
    end, has_begun = None, True
    for event in read_events(path) if path.is_file() else ():
        if isinstance(event, RunStart):
            end, has_begun = None, True
        elif isinstance(event, RunEnd) and has_begun:
            end, has_begun = event, False
    return end


def run_text(run: RunConfig) -> str:
    """The config as YAML with the origin of every value as a comment.

    The text is a config file, `out` included: `nibble train run.yaml` goes on with the run in its
    folder, and with another `--out` trains anew.
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


def changed_keys(old: RunConfig, new: RunConfig) -> dict[str, tuple[Any, Any]]:
    """The dotted keys whose values differ, old and new; the folder itself does not count."""
    before, after = old.flat(), new.flat()
    return {k: (before[k], after[k]) for k in after if k != "out" and before[k] != after[k]}
