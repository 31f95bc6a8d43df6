"""Save and restore everything that a run needs to go on as if it had never stopped.

    checkpoints/step-00000120/
        state.safetensors     trained values, both moments, random state
        manifest.json         step, counters, SHA-256 of every file

A folder is written beside, flushed to disk and renamed, so a name is a complete checkpoint. The
latest is found by validating manifests from the newest down; nothing is ever unpickled.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nibble.errors import DiskError
from nibble.train.optimizer import AdamW

STATE_FILE = "state.safetensors"
MANIFEST_FILE = "manifest.json"
FORMAT_VERSION = 1
NUM_KEPT = 2


@dataclass
class TrainState:
    """Where a run stands: the next step to take, and what it has counted."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


def save(folder: Path, state: TrainState, optimizer: AdamW, *, identity: str) -> Path:
    """Write a checkpoint below `folder` and delete all but the newest two.

    Args:
        identity: Hash of what must not change between saving and restoring.

    Raises:
        DiskError: If the files cannot be written; older checkpoints are untouched.
    """
    name = f"step-{state.step:08d}"
    temporary = folder / f".tmp-{name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        save_file(_state_tensors(optimizer), temporary / STATE_FILE)
        manifest = {
            "version": FORMAT_VERSION,
            "identity": identity,
            "state": asdict(state),
            "num_optimizer_steps": optimizer.num_steps,
            "sha256": {STATE_FILE: _sha256(temporary / STATE_FILE)},
        }
        (temporary / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2))
        for path in (temporary / STATE_FILE, temporary / MANIFEST_FILE, temporary):
            _flush(path)
        shutil.rmtree(folder / name, ignore_errors=True)
        temporary.rename(folder / name)
        _flush(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise DiskError(f"cannot write the checkpoint {folder / name}: {error}") from None
    for old in _newest_first(folder)[NUM_KEPT:]:
        shutil.rmtree(old, ignore_errors=True)
    return folder / name


def restore(folder: Path, optimizer: AdamW, *, identity: str) -> TrainState | None:
    """Load the newest complete checkpoint into `optimizer`; None if there is none."""
    for manifest, path in _valid(folder):
        if manifest["identity"] != identity:
            continue
        tensors = load_file(path / STATE_FILE)
        _set_random_state(tensors)
        optimizer.load_state(tensors, num_steps=manifest["num_optimizer_steps"])
        return TrainState(**manifest["state"])
    return None


def _valid(folder: Path) -> Iterator[tuple[dict, Path]]:
    for path in _newest_first(folder):
        try:
            manifest = json.loads((path / MANIFEST_FILE).read_text())
            is_whole = manifest["version"] == FORMAT_VERSION and all(
                _sha256(path / name) == digest for name, digest in manifest["sha256"].items()
            )
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if is_whole:
            yield manifest, path


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"), reverse=True) if folder.is_dir() else []


def _state_tensors(optimizer: AdamW) -> dict[str, Tensor]:
    tensors = {name: t.detach().cpu() for name, t in optimizer.state().items()}
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    return tensors


def _set_random_state(tensors: dict[str, Tensor]) -> None:
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
