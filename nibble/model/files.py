"""A transformers checkpoint on disk: where it is, its config, and which file holds which tensor.

Nothing in a model folder is run: JSON and safetensors only, and config keys that could name
code are dropped before transformers sees them.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from nibble.errors import ModelError, UnavailableError, did_you_mean

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
HUB_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_QUANTISED_KINDS = ("bitsandbytes",)


def find_model(name: str, revision: str | None = None) -> Path:
    """The local folder of a model: the folder itself, or the hub id's in the cache.

    Raises:
        ModelError: If there is no such folder and the name is no hub id.
        UnavailableError: If the hub cannot be reached and the cache does not hold the model.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if not name or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"model {name!r}: there is no such folder", fix=_neighbour(folder))
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=HUB_PATTERNS))
    except HFValidationError:
        raise ModelError(
            f"model {name!r} is neither a folder nor a hub id", fix=_neighbour(folder)
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise UnavailableError(
            f"model {name!r} is not a folder, and not in the cache of the hub "
            f"({type(error).__name__})",
            fix="give a local folder, or go online once so that it can be downloaded",
        ) from None


def read_config(folder: Path) -> dict[str, Any]:
    """config.json without the keys that could name code.

    Raises:
        ModelError: If it is missing, broken, or quantised in a way that nibble does not read.
    """
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{folder} holds no {CONFIG_FILE}", fix="give a folder in the transformers layout"
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ModelError(f"{path} names no model_type", fix="download config.json again")
    kind = (config.get("quantization_config") or {}).get("quant_method")
    if kind is not None and kind not in _QUANTISED_KINDS:
        raise ModelError(
            f"{path}: the weights are quantised by {kind!r}, which nibble does not read",
            fix="use the 16-bit checkpoint, or one quantised in 4 bits by bitsandbytes",
        )
    return _without_code(config)


def weight_files(folder: Path) -> dict[str, Path]:
    """Every tensor's name with the file that holds it.

    Raises:
        ModelError: If a file is missing, cut off, or the weights are pickled.
    """
    if (folder / INDEX_FILE).is_file():
        return _read_index(folder)
    if not (folder / SINGLE_FILE).is_file():
        pickled = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt"))
        fix = "save the model with safe_serialization=True" if pickled else "download it again"
        held = f"only pickled weights ({pickled[0].name})" if pickled else "no weights"
        raise ModelError(f"{folder} holds {held}, expected {SINGLE_FILE}", fix=fix)
    path = folder / SINGLE_FILE
    return dict.fromkeys(_names_in(path), path)


def checkpoint_bytes(folder: Path) -> int:
    """Size of all weights on disk."""
    return sum(path.stat().st_size for path in set(weight_files(folder).values()))


def _read_index(folder: Path) -> dict[str, Path]:
    try:
        index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder / INDEX_FILE} is broken: {error}") from None
    names = {shard: set[str]() for shard in index.values()}
    for shard in names:
        path = folder / os.path.basename(shard)
        if not path.is_file():
            raise ModelError(
                f"shard {shard} is missing in {folder} ({INDEX_FILE} lists it)",
                fix="download the model again",
            )
        names[shard] = set(_names_in(path))
    missing = [key for key, shard in index.items() if key not in names[shard]]
    if missing:
        raise ModelError(f"{folder}: {index[missing[0]]} lacks the tensor {missing[0]!r}")
    return {key: folder / os.path.basename(shard) for key, shard in index.items()}


def _names_in(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path} is cut off or broken: {error}", fix="download the file again"
        ) from None


def _without_code(config: Mapping[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for key, value in config.items():
        if key.startswith("_") or key == "auto_map" or key.endswith("_internal"):
            continue
        kept[key] = _without_code(value) if isinstance(value, dict) else value
    return kept


def _neighbour(folder: Path) -> str:
    parent = folder.parent
    names = [path.name for path in parent.iterdir() if path.is_dir()] if parent.is_dir() else []
    return did_you_mean(folder.name, names) or "check the path"
