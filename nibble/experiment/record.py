"""What a sweep is, and what was planned for its runs: OUT/sweep.json.

    OUT/sweep.json       the runs, their configs and what their plans chose and need
    OUT/run-1.yaml       what is run, and OUT/run-1.log, what its process said
    OUT/run-1/           the folder of the run
    OUT/report.json      the table, and OUT/sweep.csv, the same for a spreadsheet

Which runs are finished stands in their folders alone. A plan is made once: a sweep that goes on has
the settings it began with, whatever is free by then.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nibble.config import RunConfig
from nibble.disk import disk_errors, replace_file
from nibble.errors import FolderInUseError, UsageError
from nibble.experiment.grid import Trial
from nibble.experiment.placement import Need
from nibble.train import folder
from nibble.train.owner import LOCK_FILE, held, is_held

SWEEP_FILE = "sweep.json"


@dataclass(frozen=True)
class Planned:
    """A run that is ready to start, or the reason why it is not.

    Attributes:
        trial: The run as it was given.
        run: The same with what the plan has chosen.
        need: What it takes.
        exit_code: 0 where it can start; else that of the error, 78 for a run that does not fit.
        reason: What a person is told of that.
    """

    trial: Trial
    run: RunConfig
    need: Need
    exit_code: int = 0
    reason: str = ""


@contextmanager
def hold(out: Path) -> Iterator[None]:
    """Make the folder of a sweep if need be, and hold it against other sweeps within the block.

    Raises:
        FolderInUseError: If it holds something else than a sweep, or another sweep holds it.
        DiskError: If it cannot be made.
    """
    with disk_errors(f"cannot use the output folder {out}"):
        if out.is_file():
            raise FolderInUseError(f"{out} is a file", fix="choose another --out")
        names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    content = names - {LOCK_FILE, f".{SWEEP_FILE}.tmp"}
    if content and SWEEP_FILE not in names:
        raise FolderInUseError(
            f"{out} holds something else ({', '.join(sorted(content)[:3])})",
            fix="choose another --out or empty the folder",
        )
    with held(out):
        yield


def read_record(out: Path, trials: Sequence[Trial], *, has_halving: bool) -> list[Planned]:
    """The runs that were planned when the sweep in the folder began; nothing where there is none.

    Raises:
        FolderInUseError: If another sweep has begun there.
        DiskError: If it cannot be read.
    """
    path = out / SWEEP_FILE
    if not path.is_file():
        return []
    with disk_errors(f"cannot read {path}"):
        text = path.read_bytes()
    try:
        values = json.loads(text)
        stored = {entry["name"]: entry for entry in values["runs"]}
        is_same = values["definition"] == _definition(trials, has_halving)
        if is_same:
            found = [trial for trial in trials if trial.name in stored]
            return [_planned(trial, stored[trial.name]) for trial in found]
    except (ValueError, TypeError, KeyError, AttributeError, UsageError):
        stored = {}
    # Before anything was trained a wrong value can be corrected, unless a run is at it.
    if not stored or any(folder.has_begun(out / name) or is_held(out / name) for name in stored):
        raise FolderInUseError(
            f"{out} holds another sweep", fix="choose another --out, or run it with its own values"
        )
    return []


def write_record(out: Path, planned: Sequence[Planned], *, has_halving: bool) -> None:
    """Write down what the sweep is; what could not start is planned again next time.

    Raises:
        DiskError: If it cannot be written.
    """
    values = {
        "version": 1,
        "definition": _definition([one.trial for one in planned], has_halving),
        "runs": [
            {
                "name": one.trial.name,
                "planned": _chosen(one),
                "memory_bytes": one.need.memory_bytes,
                "host_bytes": one.need.host_bytes,
            }
            for one in planned
            if not one.exit_code
        ],
    }
    with disk_errors(f"cannot write {out / SWEEP_FILE}"):
        replace_file(out / SWEEP_FILE, (json.dumps(values, indent=1) + "\n").encode())


def _definition(trials: Sequence[Trial], has_halving: bool) -> dict[str, Any]:
    """What makes a sweep this one, as JSON gives it back."""
    runs = [
        {"name": trial.name, "settings": trial.settings, "config": _config(trial.run)}
        for trial in trials
    ]
    return {"halving": has_halving, "runs": runs}


def _config(run: RunConfig) -> dict[str, Any]:
    return {key: value for key, value in run.flat().items() if key != "out"}


def _chosen(one: Planned) -> dict[str, Any]:
    before, after = _config(one.trial.run), _config(one.run)
    return {key: value for key, value in after.items() if before[key] != value}


def _planned(trial: Trial, entry: Mapping[str, Any]) -> Planned:
    need = Need(int(entry["memory_bytes"]), int(entry["host_bytes"]))
    return Planned(trial, trial.run.with_values(entry["planned"], "planner"), need)
