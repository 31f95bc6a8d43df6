"""A sweep at work: its runs started where they fit, followed, and brought to their end.

    waiting -> running -> finished
       ^          |-----> failed
       |          |-----> stopped early     (successive halving)
       +- paused -+                         (at a rung, for the others)

What stands is in the folders of the runs: a sweep that was killed goes on with what it finds there.
"""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from nibble.config import load_config
from nibble.errors import DoesNotFitError, FolderInUseError, NibbleError, StoppedError
from nibble.experiment.engine import Ended
from nibble.experiment.follow import Followed
from nibble.experiment.halving import decide
from nibble.experiment.placement import Place, assign, fits_alone
from nibble.experiment.record import Planned
from nibble.train import folder, owner
from nibble.train.interrupt import StopSignal
from nibble.units import gigabytes

State = Literal[
    "waiting", "running", "paused", "finished", "failed", "does not fit", "stopped early"
]
TICK_SECONDS = 0.2
# A folder that another process holds is tried again after so long.
RETRY_SECONDS = 3.0
# Ends without a further step before a run that is killed again and again counts as failed.
MOST_VAIN_STARTS = 3


class Engine(Protocol):
    """Where runs execute."""

    def places(self, *, is_idle: bool) -> Sequence[Place]:
        """What runs can be put on; `is_idle` says that none of the sweep's is at work."""
        ...

    def start(self, planned: Planned, out: Path, *, at: Place) -> Any:
        """Start a run in OUT/<name>, or continue what stands there."""
        ...

    def at_work(self, out: Path, names: Collection[str]) -> Mapping[str, tuple[Any, str]]:
        """The runs that go on already, each with the name of its place."""
        ...

    def ended(self, handle: Any) -> Ended | None:
        """How a run ended; None while it is at work."""
        ...

    def stop(self, handles: Sequence[Any]) -> None:
        """Let runs finish their step, save and end."""
        ...


@dataclass
class Row:
    """How a run of the sweep stands.

    Attributes:
        planned: What it is.
        followed: What its log tells.
        place: Where it runs, or ran last.
        reason: Why it waits, has failed or does not fit.
        exit_code: That of a run that has failed or does not fit.
        lost_at: The step at which it was left behind; None if it was not.
    """

    planned: Planned
    followed: Followed
    state: State = "waiting"
    place: str = ""
    reason: str = ""
    exit_code: int = 0
    lost_at: int | None = None
    _handle: Any = None
    _not_before: float = 0.0
    _vain: tuple[int, int] = (-1, 0)

    @property
    def name(self) -> str:
        """The name of the run."""
        return self.planned.trial.name


Show = Callable[[Sequence[Row]], None]


@dataclass
class Course:
    """A sweep on its way.

    Args:
        out: Its folder, which the caller holds.
        rows: Its runs.
        engine: Where they execute.
        rungs: Steps at which the worse half is left behind.
    """

    out: Path
    rows: Sequence[Row]
    engine: Engine
    rungs: Sequence[int] = ()


def run_sweep(
    out: Path,
    planned: Sequence[Planned],
    engine: Engine,
    *,
    rungs: Sequence[int] = (),
    show: Show = lambda rows: None,
    stop: StopSignal | None = None,
) -> list[Row]:
    """Bring every run to its end, and say how each stands then.

    Args:
        out: Folder of the sweep, which the caller holds.
        rungs: Steps at which the half with the higher held-out loss is left behind.
        show: Is called again and again with the rows.
        stop: What was asked of the sweep. Whatever ends it stops the runs in order first.

    Raises:
        StoppedError: If it was asked to stop, or RunInterrupted after Ctrl-C.
        OSError: If a run cannot be written down.
    """
    course = Course(out, [_row(out, one) for one in planned], engine, rungs)
    stop = stop or StopSignal()
    stop.standing = _standing(course.rows)
    try:
        # A signal waits for the end of a look, so that no process is started and forgotten.
        with stop.patience():
            _find_at_work(course)
            while _tick(course) and not stop.name:
                stop.standing = _standing(course.rows)
                show(course.rows)
                time.sleep(TICK_SECONDS)
        if stop.name:
            raise stop.error()
    except BaseException:
        # One that has just started may not be noted yet when a second signal comes.
        _find_at_work(course)
        engine.stop([row._handle for row in course.rows if row._handle is not None])
        raise
    show(course.rows)
    return list(course.rows)


def exit_code_of(rows: Sequence[Row]) -> int:
    """That of the first run that failed; 78 where all that is left does not fit; else 0."""
    failed = [row.exit_code for row in rows if row.state == "failed"]
    if failed:
        return failed[0]
    is_any_done = any(row.state == "finished" for row in rows)
    return 0 if is_any_done else DoesNotFitError.exit_code


def _row(out: Path, planned: Planned) -> Row:
    place = out / planned.trial.name
    row = Row(planned, Followed(place))
    row.followed.update()
    if folder.is_finished(place):
        row.state = "finished"
    elif planned.exit_code:
        is_too_large = planned.exit_code == DoesNotFitError.exit_code
        row.state = "does not fit" if is_too_large else "failed"
        row.reason, row.exit_code = planned.reason, planned.exit_code
    return row


def _find_at_work(course: Course) -> None:
    """Take over the runs of this sweep that are at work and not followed yet."""
    waiting = {row.name: row for row in course.rows if row.state == "waiting"}
    for name, (handle, place) in course.engine.at_work(course.out, list(waiting)).items():
        row = waiting[name]
        if _is_as_planned(row, course.out / f"{name}.yaml"):
            row.state, row.place, row._handle = "running", place, handle
        else:
            row.state, row.exit_code = "failed", FolderInUseError.exit_code
            row.reason = f"a run with another config is at work: {name}.yaml was changed"


def _is_as_planned(row: Row, config: Path) -> bool:
    try:
        return not folder.changed_keys(load_config(config), row.planned.run)
    except NibbleError:
        return False


def _tick(course: Course) -> bool:
    """Look at every run once, and start what can start; returns whether something is left."""
    for row in course.rows:
        if row._handle is not None:
            row.followed.update()
            ended = course.engine.ended(row._handle)
            if ended is not None:
                _take_end(row, ended)
    if course.rungs:
        _halve(course)
    _start(course)
    return any(row.state in ("waiting", "running", "paused") for row in course.rows)


def _take_end(row: Row, ended: Ended) -> None:
    row.followed.update()
    row._handle, row.reason = None, ended.reason
    # It may be held by another process for a while, or hold something else for good.
    is_in_use = ended.exit_code == FolderInUseError.exit_code
    if ended.is_finished:
        row.state = "finished"
    elif is_in_use and owner.is_held(row.followed.out):
        row.state, row._not_before = "waiting", time.monotonic() + RETRY_SECONDS
    elif (is_in_use or ended.is_resumable) and not _is_in_vain(row):
        row.state = "waiting"
        # At once after some steps; what ends before its first step is given time.
        row._not_before = time.monotonic() + RETRY_SECONDS * (row._vain[1] - 1)
    else:
        row.state = "failed"
        # A process that was killed has no code of its own.
        row.exit_code = ended.exit_code if ended.exit_code > 0 else StoppedError.exit_code


def _is_in_vain(row: Row) -> bool:
    """Whether a run has ended so often without a further step."""
    step, count = row._vain
    count = count + 1 if row.followed.step <= step else 1
    row._vain = (max(step, row.followed.step), count)
    return count >= MOST_VAIN_STARTS


def _halve(course: Course) -> None:
    """Stop what has lost and what is at its rung, and let go on what has won."""
    losses = {row.name: row.followed.eval_losses for row in course.rows if _has_begun(row)}
    failed = {row.name for row in course.rows if row.state in ("failed", "does not fit")}
    verdict = decide(losses, course.rungs, failed)
    to_stop: list[Row] = []
    for row in course.rows:
        if row.state in ("failed", "does not fit"):
            continue
        row.lost_at = verdict.lost.get(row.name)
        is_waiting_there = verdict.rung in row.followed.eval_losses
        if row.lost_at is not None or (is_waiting_there and row.state != "finished"):
            to_stop += [row] if row._handle is not None else []
            row.state = "paused" if row.lost_at is None else "stopped early"
        elif row.state == "paused":
            row.state = "waiting"
    course.engine.stop([row._handle for row in to_stop])
    for row in to_stop:
        row.followed.update()
        row._handle = None


def _has_begun(row: Row) -> bool:
    return row.state not in ("failed", "does not fit") or bool(row.followed.eval_losses)


def _start(course: Course) -> None:
    """Start the waiting runs that fit beside those at work."""
    now, is_idle = time.monotonic(), all(row._handle is None for row in course.rows)
    ready = {
        row.name: row for row in course.rows if row.state == "waiting" and row._not_before <= now
    }
    if not ready:
        return
    places = course.engine.places(is_idle=is_idle)
    for name, row in list(ready.items()):
        if is_idle and not fits_alone(row.planned.need, places):
            row.state, row.exit_code = "does not fit", DoesNotFitError.exit_code
            row.reason = _no_place(row, places)
            del ready[name]
    needs = {name: row.planned.need for name, row in ready.items()}
    at_work = [(row.place, row.planned.need) for row in course.rows if row._handle is not None]
    by_name = {place.name: place for place in places}
    for name, place in assign(needs, places, at_work).items():
        row = ready[name]
        row._handle = course.engine.start(row.planned, course.out, at=by_name[place])
        row.state, row.place, row.reason = "running", place, ""


def _no_place(row: Row, places: Sequence[Place]) -> str:
    most = max((place.memory_bytes for place in places), default=0)
    needs = gigabytes(row.planned.need.memory_bytes)
    return f"it needs {needs} with its process, and no device has more than {gigabytes(most)} free."


def _standing(rows: Sequence[Row]) -> str:
    num_done = sum(row.state in ("finished", "stopped early") for row in rows)
    return f"{num_done} of {len(rows)} runs are done, and what the others did is saved"
