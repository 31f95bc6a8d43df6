"""Save and restore everything that a run needs to go on as if it had never stopped.

    checkpoints/step-00000120/
        state.safetensors     trained values, both moments, random state
        manifest.json         step, counters, identity, SHA-256 of the state and of itself

A folder is written beside, flushed to the disk and renamed: a name is a complete checkpoint. The
latest is found by validating from the newest down, by no file and no clock. Nothing is unpickled.
"""

import hashlib
import json
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from operator import index
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nibble.disk import (
    disk_errors,
    fault,
    file_sha256,
    make_folder,
    remove,
    rename,
    sync_folder,
    write_file,
)
from nibble.errors import DiskError, FolderInUseError, ModelError, NonFiniteError
from nibble.model.tensors import Entry, TensorReader, read_entries, write_tensors
from nibble.train.optimizer import AdamW, Layout
from nibble.units import size

STATE_FILE = "state.safetensors"
MANIFEST_FILE = "manifest.json"
FORMAT_VERSION = 2
# The newest that are kept; the best by held-out loss and the one resumed from stay as well.
NUM_KEPT = 2
# Of a folder that is written or deleted: never the name of a checkpoint.
_UNFINISHED = ".tmp-"
# Of one whose step is saved again, until the new one is whole.
_OLD = ".old-"
_NAME = re.compile(r"step-\d{8}")
_LARGEST_MANIFEST_BYTES = 1_000_000
_DIGEST = "manifest_sha256"
# What a run draws from, for dropout: no other generator is used.
RANDOM_STATES = ("random.cpu", "random.cuda")


@dataclass
class TrainState:
    """Where a run stands: the next step to take, what it has counted, and its best so far.

    `eval_loss` is the held-out loss after just this many steps, if it was measured. With
    `is_eval_due` it should have been measured, and the run was stopped before.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    micro_batch_size: int = 0
    eval_loss: float | None = None
    best_eval_loss: float | None = None
    is_eval_due: bool = False

    @property
    def is_best(self) -> bool:
        """Whether no held-out loss of the run was lower than the one just here."""
        return self.eval_loss is not None and self.eval_loss == self.best_eval_loss


@dataclass(frozen=True)
class Found:
    """A whole checkpoint: its folder and what its manifest says."""

    path: Path
    state: TrainState
    num_optimizer_steps: int
    identity: dict[str, str]
    sha256: str


class Damaged(Exception):  # noqa: N818
    """A checkpoint that is not what was written; the text says which file, and why."""


def save(
    folder: Path,
    state: TrainState,
    optimizer: AdamW,
    *,
    identity: Mapping[str, str],
    resumed_from: int | None = None,
) -> Path:
    """Write a checkpoint below `folder`, validate it, and delete those that are not kept.

    Args:
        identity: Name -> digest of what must not change between saving and restoring.
        resumed_from: The step of a checkpoint that is never deleted.

    Raises:
        NonFiniteError: If a value is NaN or infinite; nothing is written.
        DiskError: If the files cannot be written; older checkpoints are untouched.
    """
    fault("checkpoint.before_save")
    tensors = {**optimizer.state_pieces(), **_random_state()}
    check_finite(tensors)
    name = _name_of(state.step)
    temporary, old = folder / f"{_UNFINISHED}{name}", folder / f"{_OLD}{name}"
    with disk_errors(f"cannot write the checkpoint {folder / name}"):
        try:
            _write(temporary, tensors, _manifest(state, optimizer, identity))
            fault("checkpoint.after_write")
            if (folder / name).exists():
                rename(folder / name, old)
            rename(temporary, folder / name)
            sync_folder(folder)
        except OSError:
            remove(temporary)
            _take_back(old)
            raise
        fault("checkpoint.after_rename")
        try:
            validate(folder / name)
        except Damaged as damage:
            if old.exists():
                remove(folder / name)
                _take_back(old)
            raise DiskError(
                f"what was written is not what the disk gives back: {damage}",
                fix="check the disk; older checkpoints are untouched",
            ) from None
        remove(old)
        _prune(folder, state.step, resumed_from)
    fault("checkpoint.after_prune")
    return folder / name


def latest(folder: Path) -> tuple[Found | None, list[str]]:
    """The newest whole checkpoint, and what is wrong with those that are newer.

    Raises:
        DiskError: If there are checkpoints and all are damaged.
    """
    damages: list[str] = []
    for path in _newest_first(folder):
        try:
            return validate(path), damages
        except Damaged as damage:
            damages.append(str(damage))
    if damages:
        raise DiskError(
            f"every checkpoint in {folder} is damaged: {'; '.join(damages)}",
            fix="bring a copy of the folder back, or start over with another --out",
        )
    return None, damages


def restore(found: Found, optimizer: AdamW) -> TrainState:
    """Load a checkpoint into `optimizer` and the random generators.

    Raises:
        FolderInUseError: If the values that it holds are others than those being trained.
        DiskError: If it cannot be read.
    """
    entries = read_entries(found.path / STATE_FILE)
    random = {name: entries.pop(name) for name in RANDOM_STATES if name in entries}
    _check_entries(found, entries, optimizer.layout(entries))
    reader = TensorReader([])
    optimizer.load_state(
        {name: reader.read(entry) for name, entry in entries.items()},
        num_steps=found.num_optimizer_steps,
    )
    _set_random_state({name: reader.read(entry) for name, entry in random.items()})
    return found.state


def validate(path: Path) -> Found:
    """What the manifest of a checkpoint says, after checking every byte of the folder.

    Raises:
        Damaged: If anything is not as it was written.
    """
    found = _read_manifest(path)
    names = sorted(entry.name for entry in path.iterdir())
    if names != sorted([STATE_FILE, MANIFEST_FILE]) or (path / STATE_FILE).is_symlink():
        raise Damaged(f"{path} holds {', '.join(names)}")
    if not (path / STATE_FILE).is_file():
        raise Damaged(f"{path / STATE_FILE} is no regular file")
    try:
        if file_sha256(path / STATE_FILE) != found.sha256:
            raise Damaged(f"{path / STATE_FILE} has other bytes than its manifest says")
        read_entries(path / STATE_FILE)
    except (OSError, ModelError, DiskError) as error:
        raise Damaged(str(error)) from None
    return found


def most_at_once(*, has_eval: bool, is_resumed: bool = False) -> int:
    """How many checkpoints may stand: those that are kept, and the one that is being written."""
    return NUM_KEPT + has_eval + is_resumed + 1


def check_room(folder: Path, optimizer: AdamW, *, has_eval: bool) -> None:
    """Refuse to start where the disk has no room for the checkpoints that stand at once.

    Args:
        folder: Of the checkpoints; those that are there count as room.
        has_eval: Whether the best of them is kept as well.

    Raises:
        DiskError: If it has not.
    """
    num_at_once = most_at_once(has_eval=has_eval, is_resumed=bool(_newest_first(folder)))
    needed = num_at_once * sum(p.nbytes for ps in optimizer.state_pieces().values() for p in ps)
    held = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(folder if folder.is_dir() else folder.parent).free
    if free + held < needed:
        raise DiskError(
            f"the disk of {folder} has {size(free)} free, and {num_at_once} checkpoints take "
            f"{size(needed)}",
            fix="free space, or choose an --out on another disk",
        )


def clear_unfinished(folder: Path) -> None:
    """Put right what a run left that ended while it wrote or deleted."""
    for path in folder.glob(f"{_OLD}*"):
        _take_back(path)
        remove(path)
    for path in folder.glob(f"{_UNFINISHED}*"):
        remove(path)


def _take_back(old: Path) -> None:
    """Give a checkpoint its name again, if nothing has taken its place."""
    place = old.with_name(old.name.removeprefix(_OLD))
    if old.exists() and not place.exists():
        rename(old, place)
        sync_folder(old.parent)


def _write(temporary: Path, tensors: Mapping[str, Sequence[Tensor]], manifest: dict) -> None:
    remove(temporary)
    make_folder(temporary)
    digest = write_tensors(temporary / STATE_FILE, tensors)
    write_file(temporary / MANIFEST_FILE, [_bytes_of({**manifest, "sha256": {STATE_FILE: digest}})])
    sync_folder(temporary)


def _manifest(state: TrainState, optimizer: AdamW, identity: Mapping[str, str]) -> dict[str, Any]:
    return {
        "version": FORMAT_VERSION,
        "state": asdict(state),
        "num_optimizer_steps": optimizer.num_steps,
        "identity": dict(identity),
    }


def _bytes_of(manifest: dict[str, Any]) -> bytes:
    """The text of a manifest: with its own digest, and in one form only."""
    digest = hashlib.sha256(json.dumps(manifest, indent=2).encode()).hexdigest()
    return (json.dumps({**manifest, _DIGEST: digest}, indent=2) + "\n").encode()


def _read_manifest(path: Path) -> Found:
    """What the manifest says, if it is as it was written and belongs to this folder."""
    file = path / MANIFEST_FILE
    try:
        if file.is_symlink() or not file.is_file():
            raise Damaged(f"{file} is missing")
        if file.stat().st_size > _LARGEST_MANIFEST_BYTES:
            raise Damaged(f"{file} is too large")
        content = file.read_bytes()
        manifest = json.loads(content)
        manifest.pop(_DIGEST)
        is_whole = _bytes_of(manifest) == content
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{file} cannot be read: {error}") from None
    if not is_whole:
        raise Damaged(f"{file} has other bytes than were written")
    if manifest.get("version") != FORMAT_VERSION:
        raise Damaged(f"{file} has version {manifest.get('version')}, expected {FORMAT_VERSION}")
    try:
        found = Found(
            path=path,
            state=_state_of(manifest["state"]),
            num_optimizer_steps=index(manifest["num_optimizer_steps"]),
            identity={str(name): str(digest) for name, digest in manifest["identity"].items()},
            sha256=manifest["sha256"][STATE_FILE],
        )
        is_of_folder = path.name == _name_of(found.state.step)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Damaged(f"{file} was not written by nibble: {error}") from None
    if not is_of_folder:
        raise Damaged(f"{file} is of step {found.state.step}, which is another folder")
    return found


def _state_of(values: Mapping[str, Any]) -> TrainState:
    """The state that a manifest holds.

    Raises:
        TypeError, ValueError: If a value is none that a run could have.
    """
    state = TrainState(**values)
    counts = (state.step, state.tokens, state.micro_batch_size)
    losses = [loss for loss in (state.eval_loss, state.best_eval_loss) if loss is not None]
    if not all(type(count) is int and count >= 0 for count in counts):
        raise ValueError(f"its counts are {counts}")
    if not all(math.isfinite(number) for number in (state.seconds, *losses)):
        raise ValueError("not all of its figures are finite")
    return replace(state, is_eval_due=bool(state.is_eval_due))


def _prune(folder: Path, step: int, resumed_from: int | None) -> None:
    """Delete all but the newest, the best, and the one resumed from; later steps are damaged."""
    readable: list[TrainState] = []
    for path in _newest_first(folder):
        try:
            state = _read_manifest(path).state
        except Damaged:
            continue
        readable += [state] if state.step <= step else []
    kept = {state.step for state in readable[:NUM_KEPT]} | {resumed_from}
    measured = [state for state in readable if state.eval_loss is not None]
    best = min(measured, key=lambda state: (state.eval_loss, -state.step), default=None)
    kept |= {best.step} if best else set()
    names = {_name_of(step) for step in kept if step is not None}
    for path in _newest_first(folder):
        if path.name not in names:
            _delete(path)


def _delete(path: Path) -> None:
    """Take the name away first: what is deleted in part is then no damaged checkpoint."""
    if not path.exists():
        return
    doomed = path.with_name(f"{_UNFINISHED}gone-{path.name}")
    remove(doomed)
    rename(path, doomed)
    sync_folder(path.parent)
    remove(doomed)


def _name_of(step: int) -> str:
    return f"step-{step:08d}"


def _newest_first(folder: Path) -> list[Path]:
    """The checkpoints by their names; a copy under another name is left alone."""
    paths = folder.iterdir() if folder.is_dir() else ()
    return sorted((path for path in paths if _NAME.fullmatch(path.name)), reverse=True)


def check_finite(tensors: Mapping[str, Sequence[Tensor]]) -> None:
    """Raise a NonFiniteError if a value is NaN or infinite: no checkpoint holds one."""
    for name, pieces in tensors.items():
        floats = [p for p in pieces if p.is_floating_point() and p.numel()]
        if not all(torch.isfinite(e) for p in floats for e in torch.aminmax(p)):
            raise NonFiniteError(
                f"{name} holds NaN or infinite values; it was not saved",
                fix="lower optim.lr, or use model.dtype=float32; run it again to go on from the "
                "last checkpoint",
            )


def _check_entries(found: Found, entries: Mapping[str, Entry], expected: Layout) -> None:
    """The stored values are those that are trained, in number and type."""
    stored = {name: (entry.dtype, entry.shape) for name, entry in entries.items()}
    for name in sorted({*expected, *stored}):
        if expected.get(name) != stored.get(name):
            raise FolderInUseError(
                f"{found.path / STATE_FILE} does not fit this run: {name} is "
                f"{_described(stored.get(name))}, expected {_described(expected.get(name))}",
                fix="choose another --out: a run cannot go on with other trained values",
            )


def _described(kind: tuple[torch.dtype, tuple[int, ...]] | None) -> str:
    return f"{kind[0]} of {list(kind[1])}".removeprefix("torch.") if kind else "not there"


def _random_state() -> dict[str, list[Tensor]]:
    state = {"random.cpu": [torch.get_rng_state()]}
    if torch.cuda.is_available():
        state["random.cuda"] = [torch.cuda.get_rng_state()]
    return state


def _set_random_state(tensors: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])
