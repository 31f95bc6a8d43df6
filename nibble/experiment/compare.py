"""The same work by several methods and seeds, one run after the other, everything else equal.

    OUT/compare.json           what is compared
    OUT/<method>-seed<n>       the folder of a run; its .yaml and .log beside it (see `engine`)
    OUT/<method>-seed<n>.json  how its process ended, and what was measured afterwards

Run after run, so that the peak of memory and the time of each are its own. Methods take turns
within a seed: what slows the machine for a while meets them alike.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from nibble.config import RunConfig, check_run, flatten, load_config, unused_keys
from nibble.disk import disk_errors, file_sha256, replace_file
from nibble.errors import (
    DataError,
    DoesNotFitError,
    FolderInUseError,
    StoppedError,
    UsageError,
    did_you_mean,
)
from nibble.experiment import engine
from nibble.train import folder
from nibble.train.manifest import data_files
from nibble.train.owner import LOCK_FILE, held

METHODS = ("lora", "qlora", "full")
NUM_SEEDS = 3
COMPARISON_FILE = "compare.json"
# Held out where no file is given.
EVAL_FRACTION = 0.05
FORMAT_VERSION = 1
_POLL_SECONDS = 0.1
# Of a log of events, to find the last step in.
_LAST_BYTES = 8_192


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Attributes:
        runs: By method, the run of the first seed.
        num_seeds: Runs of each method; their seeds count up from the first.
        general: A file whose loss before and after says what was forgotten; "" is the bundled one.
    """

    runs: dict[str, RunConfig]
    num_seeds: int
    general: str = ""

    @property
    def seeds(self) -> list[int]:
        """Of the runs of each method."""
        first = next(iter(self.runs.values())).train.seed
        return list(range(first, first + self.num_seeds))

    def run(self, method: str, seed: int) -> RunConfig:
        """One of the runs."""
        return self.runs[method].with_values({"train.seed": seed}, "flag")

    def to_dict(self) -> dict[str, Any]:
        """What must be the same when it goes on; methods and seeds may be added."""
        files = [path for run in self.runs.values() for path in data_files(run)]
        files += [Path(self.general)] if self.general else []
        return {
            "version": FORMAT_VERSION,
            "runs": {method: _identity(run) for method, run in self.runs.items()},
            "general": self.general,
            "files": {str(path): file_sha256(path) for path in dict.fromkeys(files)},
        }


@dataclass(frozen=True)
class Record:
    """How a run ended.

    Attributes:
        exit_code: Of its process.
        reason: Why it is not finished; empty where it is.
        fix: What to do about it, where the run said so.
        seconds: Of its processes from start to end; None where one of them was not seen to end.
        measured: What was measured of its result afterwards, as `Measured` has it.
    """

    exit_code: int
    reason: str = ""
    fix: str = ""
    seconds: float | None = None
    measured: dict[str, Any] = field(default_factory=dict)

    @property
    def is_finished(self) -> bool:
        """Whether the run did all its steps."""
        return self.exit_code == 0

    @property
    def is_too_large(self) -> bool:
        """Whether the plan refused it."""
        return self.exit_code == DoesNotFitError.exit_code

    @property
    def is_failed(self) -> bool:
        """Whether it ended otherwise."""
        return not (self.is_finished or self.is_too_large)


@dataclass(frozen=True)
class Progress:
    """Where a comparison stands: the run at work, its number among all, and its steps."""

    name: str
    number: int
    num_runs: int
    step: int = 0
    record: Record | None = None


Watch = Callable[[Progress], None]


def read_comparison(
    recipe: Path | None,
    overrides: Sequence[str],
    *,
    methods: Sequence[str] = METHODS,
    num_seeds: int = NUM_SEEDS,
    general: str = "",
) -> Comparison:
    """What a recipe and overrides describe.

    Args:
        overrides: `section.key=value` for all methods, `METHOD:section.key=value` for one.

    Raises:
        UsageError: If a method, a key or a value is wrong.
        DataError: If `general` is no file.
    """
    for method in methods:
        if method not in METHODS:
            close = did_you_mean(method, METHODS)
            raise UsageError(
                f"--methods: there is no method {method!r}, expected some of {', '.join(METHODS)}",
                fix=close or "for example --methods lora,qlora",
            )
    if not methods or len(set(methods)) < len(methods):
        raise UsageError(
            f"--methods {','.join(methods)}: expected different methods",
            fix="for example --methods lora,qlora",
        )
    if num_seeds < 1:
        raise UsageError(f"--seeds {num_seeds}: expected at least 1", fix="for example --seeds 3")
    if general and not Path(general).is_file():
        raise DataError("no such file", path=general, fix="give --general-data a data file")
    common, own = _split_overrides(overrides, methods)
    ordered = [method for method in METHODS if method in methods]
    runs = {method: _read_run(recipe, method, common, own[method]) for method in ordered}
    return Comparison(runs, num_seeds, general)


def _split_overrides(
    overrides: Sequence[str], methods: Sequence[str]
) -> tuple[list[str], dict[str, list[str]]]:
    """Those of all methods, and by method its own."""
    common: list[str] = []
    own: dict[str, list[str]] = {method: [] for method in METHODS}
    for override in overrides:
        head, colon, tail = override.partition("=")[0].partition(":")
        if not colon:
            common.append(override)
            continue
        if head not in methods:
            raise UsageError(
                f"--set {override}: {head!r} is not among the methods compared",
                fix=f"write for example --set {methods[0]}:{tail}=...",
            )
        own[head].append(override.removeprefix(f"{head}:"))
    for override in [*common, *(text for texts in own.values() for text in texts)]:
        key = override.partition("=")[0].strip()
        if key in ("method", "out"):
            flag = {"method": "--methods", "out": "--out"}[key]
            raise UsageError(f"--set {override}: every run has its own", fix=f"give {flag}")
    return common, own


def _read_run(
    recipe: Path | None, method: str, common: Sequence[str], own: Sequence[str]
) -> RunConfig:
    """The run of a method: what it has no use for is left at the defaults."""
    words = [*common, f"method={method}"]
    defaults = RunConfig().flat()
    unused = {key: defaults[key] for key in unused_keys(load_config(recipe, words))}
    run = load_config(recipe, [*words, *own])
    for override in own:
        unused.pop(override.partition("=")[0].strip(), None)
    run = run.with_values(unused, "default")
    if run.data.eval is None:
        run = run.with_values({"data.eval": EVAL_FRACTION}, "default")
    # Otherwise a plan may choose another arithmetic for one of the methods.
    run = run.with_values({"optim.name": run.optim.name, "out": None}, "flag")
    check_run(run)
    return run


def compare(
    comparison: Comparison,
    place: Path,
    watch: Watch = lambda progress: None,
    *,
    measure: Callable[[Path, str], dict[str, Any]],
) -> dict[tuple[str, int], Record]:
    """Run what is not finished yet, and measure what is not measured yet.

    Args:
        place: The folder of the comparison.
        watch: Told when a run begins, moves on and ends.
        measure: Of a run folder and the general text, what `Record.measured` is to hold.

    Returns:
        By method and seed, how each run ended.

    Raises:
        FolderInUseError: If the folder holds something else, or another comparison.
        DiskError: If a file cannot be read or written.
        NibbleError: Whatever stopped it; the run at work has ended in order by then.
    """
    with held(place), disk_errors(f"{place}: a file cannot be read or written"):
        _check_place(comparison, place)
        records = _train_all(comparison, place, watch)
        # After the last run: a model that is measured here takes memory that a run would miss.
        for (method, seed), record in records.items():
            if record.is_finished and not record.measured:
                name = run_name(method, seed)
                record = replace(record, measured=measure(place / name, comparison.general))
                records[method, seed] = record
                _write_record(place, name, record)
    return records


def run_name(method: str, seed: int) -> str:
    """The folder of a run in that of the comparison."""
    return f"{method}-seed{seed}"


def _check_place(comparison: Comparison, place: Path) -> None:
    path, now = place / COMPARISON_FILE, comparison.to_dict()
    if not path.is_file():
        content = sorted(p.name for p in place.iterdir() if p.name != LOCK_FILE)
        if content:
            raise FolderInUseError(
                f"{place} holds something else ({', '.join(content[:3])})",
                fix="choose another --out or empty the folder",
            )
    # Before a run has saved anything, a wrong path can be corrected.
    elif any(folder.has_begun(run) for run in place.iterdir() if run.is_dir()):
        changed = _differences(_read_json(path), now)
        if changed:
            raise FolderInUseError(
                f"{place} holds another comparison ({', '.join(changed[:5])})",
                fix="choose another --out, or repeat the command with what is in "
                f"{COMPARISON_FILE}; methods and seeds may be added",
            )
        now["runs"] = {**_read_json(path).get("runs", {}), **now["runs"]}
    replace_file(path, (json.dumps(now, indent=2, ensure_ascii=False) + "\n").encode())


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs, apart from methods that are only in one of them."""
    old_runs, new_runs = old.get("runs", {}), new["runs"]
    found = [
        f"{method}: {key}: {old_runs[method].get(key)!r} -> {value!r}"
        for method, run in new_runs.items()
        for key, value in run.items()
        if method in old_runs and old_runs[method].get(key) != value
    ]
    before, after = (flatten({k: v for k, v in x.items() if k != "runs"}) for x in (old, new))
    found += [
        f"{key.removeprefix('files.')} has changed"
        for key in after
        if before.get(key) != after[key]
    ]
    return found


def _identity(run: RunConfig) -> dict[str, Any]:
    return {key: value for key, value in run.flat().items() if key not in ("out", "method")}


def _train_all(comparison: Comparison, place: Path, watch: Watch) -> dict[tuple[str, int], Record]:
    turns = [(method, seed) for seed in comparison.seeds for method in comparison.runs]
    records: dict[tuple[str, int], Record] = {}
    too_large: dict[str, Record] = {}
    for number, (method, seed) in enumerate(turns, start=1):
        begun = Progress(run_name(method, seed), number, len(turns))
        record = too_large.get(method) or _finished(place, begun.name)
        if record is None:
            watch(begun)
            record = _train(comparison.run(method, seed), place, begun, watch)
            _write_record(place, begun.name, record)
        if record.is_too_large:
            too_large[method] = record
        records[method, seed] = record
        watch(replace(begun, record=record))
    return records


def _finished(place: Path, name: str) -> Record | None:
    """The record of a run that needs no more."""
    if not folder.is_finished(place / name):
        return None
    record = _read_record(place, name)
    # Whoever waited for it was killed before its end.
    return record if record is not None and record.is_finished else Record(0)


def _train(run: RunConfig, place: Path, begun: Progress, watch: Watch) -> Record:
    earlier = _read_record(place, begun.name)
    has_begun = folder.has_begun(place / begun.name)
    before = 0.0 if not has_begun else earlier.seconds if earlier is not None else None
    started = engine.start(run, place, begun.name)
    try:
        ended = _follow(started, begun, watch)
    except BaseException:
        engine.stop(started)
        stopped = engine.ended(started)
        seconds = None if stopped is None or before is None else before + stopped.seconds
        _write_record(place, begun.name, Record(StoppedError.exit_code, "stopped", "", seconds))
        raise
    seconds = None if before is None else before + ended.seconds
    code = StoppedError.exit_code if ended.exit_code < 0 else ended.exit_code
    return Record(code, ended.reason, ended.fix, seconds)


def _follow(started: engine.Started, begun: Progress, watch: Watch) -> engine.Ended:
    """Tell of the steps of a run until it ends."""
    told = 0
    while (ended := engine.ended(started)) is None:
        step = _last_step(started.out / folder.EVENTS_FILE)
        if step > told:
            told = step
            watch(replace(begun, step=step))
        time.sleep(_POLL_SECONDS)
    return ended


def _last_step(events: Path) -> int:
    """The last step in a log of events; 0 where there is none."""
    try:
        with events.open("rb") as file:
            file.seek(max(0, events.stat().st_size - _LAST_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        if line.startswith(b'{"event": "step"'):
            try:
                return int(json.loads(line)["step"])
            except (ValueError, KeyError, TypeError):
                continue
    return 0


def _read_record(place: Path, name: str) -> Record | None:
    values = _read_json(place / f"{name}.json")
    try:
        return Record(**{key: values[key] for key in Record.__dataclass_fields__})
    except KeyError:
        return None


def _write_record(place: Path, name: str, record: Record) -> None:
    text = json.dumps({"version": FORMAT_VERSION, **asdict(record)}, indent=2, ensure_ascii=False)
    replace_file(place / f"{name}.json", f"{text}\n".encode())


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
