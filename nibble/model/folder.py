"""Folders that others made: which of their files may be read, and JSON that says one thing.

    check_files    every file that counts is a regular one, of the folder itself
    read_json      bounded in size, UTF-8, no key twice, no NaN
    plain_values   the values of a config without what could name code, a file or a kernel

A link may lead to another file of the folder, or, in the cache of the hub, to one of its blobs.
"""

import json
import math
import re
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from nibble.errors import DiskError, ModelError

MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
_CHECKED = (*MODEL_FILES, "tokenizer*", "vocab*")
# JSON takes up to 27 times its size as Python objects: 16 MB stay below half a gigabyte.
LARGEST_JSON_BYTES = 16_000_000
# What is no key of a model: how transformers loads, and whose code it would run.
_NEVER_KEYS = {
    "auto_map", "custom_generate", "custom_pipelines", "attn_implementation",
    "experts_implementation", "name_or_path", "trust_remote_code", "tokenizer_class", "init_inputs",
    "fast_tokenizer_files",
}  # fmt: skip
_KEY = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]*")
# A path, a hub id and an address all have a slash.
_WORD = re.compile(r"[\w.+-]{0,200}", re.ASCII)
# Keys whose text chooses among what there is: left out, another would be chosen in silence.
_CHOICE = re.compile(r".*(act|activation|activation_function|type)")


def check_files(folder: Path) -> None:
    """Refuse a folder with a file that is not its own, or that is none.

    Raises:
        ModelError: If a link leads out of the folder or nowhere, or a file is a pipe or a device.
        DiskError: If the folder cannot be read.
    """
    try:
        root = folder.resolve(strict=True)
        for path in sorted(folder.iterdir()):
            if any(fnmatch(path.name, pattern) for pattern in _CHECKED):
                _check_file(root, path)
    except (OSError, RuntimeError) as error:  # a loop of links is a RuntimeError
        raise DiskError(f"{folder} cannot be read: {error}", fix="check the path") from None


def _check_file(root: Path, path: Path) -> None:
    if path.is_symlink() and not path.exists():
        raise ModelError(f"{path} is a link to nothing", fix="download the file again")
    real = path.resolve(strict=True)
    if not any(real.is_relative_to(allowed) for allowed in (root, *_blobs_of(root))):
        raise ModelError(
            f"{path} is a link that leaves its folder",
            fix="copy the file into the folder, or give the folder that it is in",
        )
    if not real.is_file() and not real.is_dir():
        raise ModelError(f"{path} is no regular file", fix="remove it, or download it again")


def _blobs_of(root: Path) -> list[Path]:
    """Where the files of .../models--owner--name/snapshots/<commit> stand."""
    is_snapshot = root.parent.name == "snapshots" and "--" in root.parents[1].name
    return [root.parents[1] / "blobs"] if is_snapshot else []


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is too large, not UTF-8, not JSON, or has a key twice, NaN or infinity.
        DiskError: If it cannot be read.
    """
    if not path.is_file():
        raise FileNotFoundError(path)
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_JSON_BYTES + 1)
    except OSError as error:
        raise DiskError(f"{path} cannot be read: {error.strerror}") from None
    return parse_json(content)


def parse_json(content: bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: As in `read_json`.
    """
    if len(content) > LARGEST_JSON_BYTES:
        raise ValueError(f"it is larger than {LARGEST_JSON_BYTES:,} bytes")
    try:
        return json.loads(
            content.decode("utf-8"), object_pairs_hook=_once, parse_constant=_refuse_constant
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def plain_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers, words, lists and objects of them; without keys and texts that could name code.

    Raises:
        ValueError: If a number is not finite, a choice is no word, or values are nested too deeply.
    """
    try:
        return {key: _plain(value) for key, value in values.items() if _is_kept(key, value)}
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _is_kept(key: str, value: Any) -> bool:
    is_named = _KEY.fullmatch(key) and not key.endswith(("_internal", "_file"))
    is_word = not isinstance(value, str) or _WORD.fullmatch(value)
    if not is_word and _CHOICE.fullmatch(key):
        raise ValueError(f"{key[:80]} is {value[:80]!r}, expected a word")
    return bool(is_named and is_word) and key not in _NEVER_KEYS


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return plain_values(value)
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is no number")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"it has the key {twice[:80]!r} twice")
    return made


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"it has the value {name}")
