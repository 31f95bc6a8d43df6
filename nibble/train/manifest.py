"""What a run is made of: its identity, and the environment it ran in.

    identity       every config value, and digests of base, data, tokenizer, template and rows
    environment    versions, threads, processor, device, and a digest of nibble's own code

A run is continued only with the identity it began with. `manifest.json` in the run folder holds
both; `nibble replay` compares them before it compares bits.
"""

import hashlib
import json
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nibble.config import RunConfig
from nibble.data.dataset import Dataset
from nibble.data.packing import Row
from nibble.disk import disk_errors, file_sha256, replace_file
from nibble.model.files import find_model, read_index

MANIFEST_FILE = "manifest.json"
FORMAT_VERSION = 2
_PACKAGES = ("nibble", "torch", "transformers", "tokenizers", "safetensors", "numpy")
_TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model",
)  # fmt: skip
# A base may be too large to read again: so many blocks of each weight file stand for it.
_NUM_BLOCKS = 64
_BLOCK_BYTES = 1 << 12
_CPU_INFO = Path("/proc/cpuinfo")


def identity_of(run: RunConfig, tokenizer: Any, dataset: Dataset) -> dict[str, str]:
    """Name -> value or digest of everything that decides the course of a run."""
    folder = find_model(run.model.name, run.model.revision)
    with disk_errors("cannot read what the run is made of"):
        return {
            **{key: json.dumps(value) for key, value in run.flat().items() if key != "out"},
            "base": _base_digest(folder),
            "data": _digest(file_sha256(path).encode() for path in data_files(run)),
            "tokenizer": _digest(_tokenizer_files(folder)),
            "template": _digest([str(getattr(tokenizer, "chat_template", "")).encode()]),
            "rows": _digest(chain(_row_bytes(dataset.train), _row_bytes(dataset.eval))),
        }


def environment(world_size: int = 1) -> dict[str, str]:
    """What the bits of a result depend on beside the identity of a run."""
    is_cuda = torch.cuda.is_available()
    return {
        **{name: package_version(name) for name in _PACKAGES},
        "code": _code_digest(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "device": torch.cuda.get_device_name() if is_cuda else "cpu",
        "cuda": str(torch.version.cuda) if is_cuda else "none",
        "ranks": str(world_size),
    }


def versions() -> dict[str, str]:
    """Of the environment, what every rank of a run has to have alike."""
    now = environment()
    return {name: now[name] for name in (*_PACKAGES, "code", "python", "cuda")}


def write_manifest(out: Path, identity: dict[str, str], environment: dict[str, str]) -> None:
    """Write identity and environment into a run folder.

    Raises:
        OSError: If it cannot be written.
    """
    values = {"version": FORMAT_VERSION, "identity": identity, "environment": environment}
    replace_file(out / MANIFEST_FILE, (json.dumps(values, indent=2) + "\n").encode())


def read_manifest(out: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Identity and environment of a run; empty where there are none."""
    try:
        values = json.loads((out / MANIFEST_FILE).read_text(encoding="utf-8"))
        return _texts(values["identity"]), _texts(values["environment"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}, {}


def _texts(values: dict[str, Any]) -> dict[str, str]:
    return {name: value for name, value in values.items() if isinstance(value, str)}


def differences(old: dict[str, str], new: dict[str, str]) -> dict[str, tuple[str, str]]:
    """Name -> old and new value, where they are not the same."""
    return {
        name: (old.get(name, "not there"), new.get(name, "not there"))
        for name in {**old, **new}
        if old.get(name) != new.get(name)
    }


def listed(changed: Mapping[str, tuple[str, str]]) -> str:
    """Differences for a person: name: old -> new."""
    return ", ".join(
        f"{name}: {_short(old)} -> {_short(new)}" for name, (old, new) in changed.items()
    )


def _short(value: str) -> str:
    return value if len(value) <= 40 else f"{value[:12]}..."


def data_files(run: RunConfig) -> list[Path]:
    """The files that rows are read from; hub ids have none."""
    train = run.data.train if isinstance(run.data.train, list) else [run.data.train]
    held_out = [run.data.eval] if isinstance(run.data.eval, str) else []
    return [Path(name) for name in [*train, *held_out] if Path(name).is_file()]


def package_version(package: str) -> str:
    """The installed version, or "not installed"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _base_digest(folder: Path) -> str:
    """Of config.json, and of name, size and some blocks of every weight file."""
    files = sorted({entry.path for entry in read_index(folder).values()})
    parts = [(folder / "config.json").read_bytes()]
    for path in files:
        size = path.stat().st_size
        parts.append(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for number in range(_NUM_BLOCKS + 1):
                file.seek(max(0, size - _BLOCK_BYTES) * number // _NUM_BLOCKS)
                parts.append(file.read(_BLOCK_BYTES))
    return _digest(parts)


def _tokenizer_files(folder: Path) -> Iterator[bytes]:
    for path in sorted({path for name in _TOKENIZER_FILES for path in folder.glob(name)}):
        if path.is_file():
            yield f"{path.name} {file_sha256(path)}".encode()


def _row_bytes(rows: Sequence[Row]) -> Iterator[bytes]:
    yield str(len(rows)).encode()
    for row in rows:
        for values in (row.input_ids, row.labels, row.segment_ids):
            yield np.ascontiguousarray(values).tobytes()


def _digest(parts: Iterable[bytes]) -> str:
    """SHA-256 of parts, each with its length."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(len(part).to_bytes(8, "little") + part)
    return whole.hexdigest()


@cache
def _code_digest() -> str:
    root = Path(__file__).parents[1]
    files = sorted(path for suffix in ("*.py", "*.c") for path in root.rglob(suffix))
    return _digest(path.read_bytes() for path in files)


def _processor() -> str:
    try:
        lines = _CPU_INFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
