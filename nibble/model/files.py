"""A transformers checkpoint on disk: where it is, its config, and where each tensor stands.

Nothing in a model folder is run: JSON and safetensors only, and config keys that could name
code are dropped before transformers sees them.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import (
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from nibble.errors import ModelError, UnavailableError, UsageError, did_you_mean
from nibble.model.folder import MODEL_FILES, check_files, plain_values, read_json
from nibble.model.tensors import Entry, read_entries

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


def find_model(name: str, revision: str | None = None) -> Path:
    """The local folder of a model: the folder itself, or the hub id's in the cache.

    Raises:
        UsageError: If there is no such folder and the name is no hub id.
        UnavailableError: If the hub cannot be reached and the cache does not hold the model.
    """

    return _find(name, revision, lambda is_offline: _fetch(name, revision, MODEL_FILES, is_offline))


def find_tokenizer(name: str) -> Path:
    """Like `find_model`; of a hub id the weights are not fetched."""
    wanted = [pattern for pattern in MODEL_FILES if not pattern.endswith(".safetensors")]
    return _find(name, None, lambda is_offline: _fetch(name, None, wanted, is_offline))


def _fetch(name: str, revision: str | None, wanted: Sequence[str], is_offline: bool) -> Path:
    path = snapshot_download(
        name, revision=revision, allow_patterns=list(wanted), local_files_only=is_offline
    )
    return Path(path)


def _find(name: str, revision: str | None, fetch: Callable[[bool], Path]) -> Path:
    """The folder of this name, or what `fetch(is_offline)` gets of the hub id."""
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        return folder
    if folder.is_file():
        raise UsageError(f"model {name!r} is a file", fix=f"give its folder, {folder.parent}")
    if not name or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UsageError(f"model {name!r}: there is no such folder", fix=_neighbour(folder))
    try:
        return fetch(not _is_reachable(name, revision))
    except HFValidationError:
        raise UsageError(
            f"model {name!r} is neither a folder nor a hub id", fix=_neighbour(folder)
        ) from None
    except (RepositoryNotFoundError, RevisionNotFoundError):
        named = name if revision is None else f"{name} at {revision}"
        raise UsageError(
            f"the hub has no model {named!r}, or it is private",
            fix="check the name; for a private or gated model log in to the hub first",
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise UnavailableError(
            f"model {name!r} is not a folder, and not in the cache of the hub, which cannot be "
            f"reached ({type(error).__name__})",
            fix="give a local folder, or go online once so that it can be downloaded",
        ) from None


def _is_reachable(name: str, revision: str | None) -> bool:
    """Whether the hub answers at once; its own client would ask six times over half a minute."""
    try:
        get_hf_file_metadata(hf_hub_url(name, CONFIG_FILE, revision=revision))
    except HfHubHTTPError as error:
        is_missing = isinstance(error, RepositoryNotFoundError | RevisionNotFoundError)
        return is_missing or error.response.status_code < 500
    except Exception:  # offline mode, no name service, no route, a timeout: kinds of two libraries
        return False
    return True


def find_config(name: str, revision: str | None = None) -> dict[str, Any]:
    """The values of config.json of a folder or a hub id; of a hub id nothing else is fetched.

    Raises:
        UsageError: If there is no such folder and the name is no hub id.
        ModelError: If the config is broken.
        UnavailableError: If the hub cannot be reached and the cache does not hold the config.
    """

    def fetch(is_offline: bool) -> Path:
        path = hf_hub_download(name, CONFIG_FILE, revision=revision, local_files_only=is_offline)
        return Path(path).parent

    return read_config(_find(name, revision, fetch))


def read_config(folder: Path) -> dict[str, Any]:
    """config.json without the keys that could name code.

    Raises:
        ModelError: If it is missing or broken.
    """
    path = folder / CONFIG_FILE
    check_files(folder)
    try:
        config = read_json(path)
    except FileNotFoundError:
        raise ModelError(
            f"{folder} holds no {CONFIG_FILE}", fix="give a folder in the transformers layout"
        ) from None
    except ValueError as error:
        raise ModelError(
            f"{path} is not valid JSON: {error}", fix="download config.json again"
        ) from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ModelError(f"{path} names no model_type", fix="download config.json again")
    try:
        return plain_values(config)
    except ValueError as error:
        raise ModelError(f"{path}: {error}", fix="download config.json again") from None


def read_index(folder: Path) -> dict[str, Entry]:
    """Where each tensor of the checkpoint stands, by its name on disk.

    Raises:
        ModelError: If a file is missing or cut off, or the weights are pickled.
    """
    check_files(folder)
    if (folder / INDEX_FILE).is_file():
        return _read_shards(folder)
    if (folder / SINGLE_FILE).is_file():
        return read_entries(folder / SINGLE_FILE)
    pickled = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
    if pickled:
        raise ModelError(
            f"{folder} holds pickled weights only ({pickled[0].name}), which can run code",
            fix="convert them to safetensors: save the model with safe_serialization=True",
        )
    shards = sorted(folder.glob("*.safetensors"))
    held = f"{shards[0].name} but no {INDEX_FILE}" if shards else "no weights"
    raise ModelError(
        f"{folder} holds {held}, expected {SINGLE_FILE} or {INDEX_FILE}",
        fix="download the model again",
    )


def _read_shards(folder: Path) -> dict[str, Entry]:
    try:
        weight_map = read_json(folder / INDEX_FILE)["weight_map"]
        shards = sorted({Path(shard).name for shard in set(weight_map.values())})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{folder / INDEX_FILE} is broken: {error}", fix="download the file again"
        ) from None
    entries: dict[str, Entry] = {}
    for shard in shards:
        if not (folder / shard).is_file():
            raise ModelError(
                f"shard {shard} is missing in {folder} ({INDEX_FILE} lists it)",
                fix="download the model again",
            )
        entries.update(read_entries(folder / shard))
    missing = [name for name in weight_map if name not in entries]
    if missing:
        raise ModelError(
            f"{folder}: {weight_map[missing[0]]} lacks the tensor {missing[0]!r} "
            f"({len(missing)} missing)",
            fix="download the model again",
        )
    return entries


def _neighbour(folder: Path) -> str:
    parent = folder.parent
    names = [path.name for path in parent.iterdir() if path.is_dir()] if parent.is_dir() else []
    return did_you_mean(folder.name, names) or "check the path"
