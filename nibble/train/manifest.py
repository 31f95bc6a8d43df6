"""manifest.json: what a run was made of, so that it can be repeated or compared."""

import hashlib
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from nibble import yamlfile
from nibble.config import RunConfig
from nibble.model.files import find_model, read_index

_PACKAGES = ("nibble", "torch", "transformers", "tokenizers", "safetensors")


def write_manifest(out: Path, run: RunConfig) -> None:
    """Hashes of config, data and base, and the versions in use."""
    manifest = {
        "version": 1,
        "config_sha256": hashlib.sha256(yamlfile.write(run.model_dump()).encode()).hexdigest(),
        "data": {path: _sha256(Path(path)) for path in _data_files(run)},
        "base": _base(run),
        "versions": {name: package_version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    (out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _data_files(run: RunConfig) -> list[str]:
    train = run.data.train if isinstance(run.data.train, list) else [run.data.train]
    held_out = [run.data.eval] if isinstance(run.data.eval, str) else []
    return [name for name in [*train, *held_out] if Path(name).is_file()]


def _base(run: RunConfig) -> dict[str, Any]:
    """The config's hash and every weight file's size: a base may be too large to read again."""
    folder = find_model(run.model.name, run.model.revision)
    files = sorted({entry.path for entry in read_index(folder).values()})
    sizes = {path.name: path.stat().st_size for path in files}
    return {"config_sha256": _sha256(folder / "config.json"), "weight_bytes": sizes}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def package_version(package: str) -> str:
    """The installed version, or "not installed"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
