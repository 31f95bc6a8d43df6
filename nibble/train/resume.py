"""Where a run goes on from: the newest whole checkpoint that belongs to it."""

from collections.abc import Collection
from pathlib import Path

from nibble.errors import FolderInUseError
from nibble.events import Emit, WarningRaised
from nibble.train import checkpoint
from nibble.train.checkpoint import TrainState
from nibble.train.manifest import differences, listed
from nibble.train.optimizer import AdamW


def find_state(
    folder: Path,
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
        folder: The checkpoints of a run.
        identity: What the run is made of now.
        allow_change: Names in `identity` that may have changed since.

    Raises:
        FolderInUseError: If something else has changed.
        DiskError: If there are checkpoints and all are damaged.
    """
    checkpoint.clear_unfinished(folder)
    found, damages = checkpoint.latest(folder)
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
