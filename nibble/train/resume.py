"""Where a run goes on from: the newest whole checkpoint that belongs to it."""

from collections.abc import Collection
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from nibble.errors import FolderInUseError, UsageError
from nibble.events import Emit, MetricsTable, StepEnd, WarningRaised, last_attempts, read_events
from nibble.train import checkpoint, folder
from nibble.train.checkpoint import TrainState
from nibble.train.distributed import Ranks
from nibble.train.manifest import differences, listed
from nibble.train.optimizer import AdamW


def find_state(
    checkpoints: Path,
    optimizer: AdamW,
    *,
    identity: dict[str, str],
    allow_change: Collection[str],
    emit: Emit,
) -> tuple[TrainState, list[str]]:
    """Load the newest whole checkpoint into `optimizer`, and say which newer ones are damaged.

    Returns:
        Where the run stands, and the names in `identity` of what has changed since.

    Args:
        checkpoints: The folder of those of a run.
        identity: What the run is made of now.
        allow_change: Names in `identity` that may have changed since.

    Raises:
        FolderInUseError: If something else has changed.
        DiskError: If there are checkpoints and all are damaged.
    """
    checkpoint.clear_unfinished(checkpoints)
    found, damages = checkpoint.latest(checkpoints)
    if found is None:
        return TrainState(), []
    changed = differences(found.identity, identity)
    refused = [name for name in changed if name not in allow_change]
    if refused:
        raise FolderInUseError(
            f"{found.path} was made of something else ({listed(changed)})",
            fix="bring that back, choose another --out, or go on with the change: "
            + " ".join(f"--allow-change {name}" for name in refused),
        )
    state = checkpoint.restore(found, optimizer)
    for damage in damages:
        emit(WarningRaised(f"{damage}; going on from step {state.step} instead"))
    if changed:
        emit(WarningRaised(f"going on with other {', '.join(changed)} than the run began with"))
    return state, list(changed)


def check_steps(num_done: int, num_asked: int) -> None:
    """Refuse to go on with a run that has more steps than it is to have.

    Raises:
        UsageError: If it has.
    """
    if num_done > num_asked:
        raise UsageError(
            f"{num_done} steps are done, and the run is to have {num_asked}",
            fix="ask for as many or more with train.steps or train.epochs, or choose another --out",
        )


def standing_table(out: Path, step: int, emit: Emit) -> MetricsTable:
    """metrics.csv with the steps that stand; what has more of them than the log is set aside."""
    path, events = out / folder.METRICS_FILE, read_events(out / folder.EVENTS_FILE)
    standing = last_attempts(events, step) if step else []
    num_known = sum(isinstance(event, StepEnd) for event in standing)
    if num_known < step:
        aside = path.with_name(f"{path.name}.old")
        with suppress(FileNotFoundError):
            path.replace(aside)
        emit(
            WarningRaised(
                f"{folder.EVENTS_FILE} has {num_known} of the {step} steps that are done: "
                f"{path.name} begins with those, and {aside.name} is what it was"
            )
        )
    return MetricsTable(path, standing)


def share_state(state: TrainState, optimizer: AdamW, ranks: Ranks) -> TrainState:
    """Where rank 0 stands, on every rank, with its trained values and moments in `optimizer`."""
    values, optimizer.num_steps = ranks.of_first([asdict(state), optimizer.num_steps])
    ranks.copy_first(piece for pieces in optimizer.state_pieces().values() for piece in pieces)
    return state if ranks.is_first else TrainState(**values)
