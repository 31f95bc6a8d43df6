"""The tokenizer of a model folder, read without trust.

folder       its tokenizer files, checked, linked into a folder of our own
values       tokenizer_config.json without keys that name files, code or classes of others
transformers reads that folder, and nothing else
"""

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from nibble.disk import disk_errors
from nibble.errors import ModelError, NibbleError
from nibble.model.folder import check_files, plain_values, read_json

CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_TABLES = ("special_tokens_map.json", "added_tokens.json")
_LINKED = (*_VOCABULARIES, "merges.txt", "vocab.txt", TEMPLATE_FILE)
_LARGEST_FILE_BYTES = 128_000_000
# A template of a model takes tens of kilobytes.
LARGEST_TEMPLATE_BYTES = 1_000_000
# The keys whose texts are no words: tokens and templates, which are data.
_TEXTS = ("chat_template", "additional_special_tokens", "extra_special_tokens",
          "added_tokens_decoder", "model_input_names", "model_specific_special_tokens")  # fmt: skip
_ANY_CLASS = "PreTrainedTokenizerFast"
_FIX = "copy the tokenizer files again"


def load_tokenizer(folder: Path, config: Any = None) -> Any:
    """The tokenizer of a model folder.

    Raises:
        ModelError: If there is none, or it cannot be read.
        DiskError: If a file cannot be read.
    """
    check_files(folder)
    if not any((folder / name).is_file() for name in _VOCABULARIES):
        raise ModelError(
            f"{folder} holds no tokenizer ({', '.join(_VOCABULARIES)})",
            fix="copy the tokenizer files of the model into the folder",
        )
    try:
        with tempfile.TemporaryDirectory(prefix="nibble-tokenizer-") as own:
            _fill(Path(own), folder)
            tokenizer = AutoTokenizer.from_pretrained(
                own, config=config, trust_remote_code=False, local_files_only=True
            )
    except (NibbleError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the Rust library is no Exception
        raise ModelError(f"the tokenizer in {folder} cannot be read: {error}", fix=_FIX) from None
    tokenizer.name_or_path = str(folder)
    return tokenizer


def read_template(folder: Path) -> str | None:
    """The chat template of a folder, such as that of an adapter; None where it has none.

    Raises:
        ModelError: If it is too large or cannot be read.
        DiskError: If a file cannot be read.
    """
    path, config = folder / TEMPLATE_FILE, folder / CONFIG_FILE
    template: Any = None
    with disk_errors(f"cannot read the chat template of {folder}"):
        if path.is_file():
            if path.stat().st_size > LARGEST_TEMPLATE_BYTES:
                raise ModelError(
                    f"{path} is larger than {LARGEST_TEMPLATE_BYTES:,} bytes", fix=_FIX
                )
            template = _read_text(path)
        elif config.is_file():
            template = _read_object(config).get("chat_template")
    if isinstance(template, str) and len(template) > LARGEST_TEMPLATE_BYTES:
        raise ModelError(f"{config}: the chat template is too large", fix=_FIX)
    return template if isinstance(template, str) and template else None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ModelError(f"{path} is not UTF-8: {error}", fix=_FIX) from None


def _fill(own: Path, folder: Path) -> None:
    """Put the files of `folder` that transformers may see into an empty one."""
    for name in _LINKED:
        path = folder / name
        if not path.is_file():
            continue
        limit = LARGEST_TEMPLATE_BYTES if name == TEMPLATE_FILE else _LARGEST_FILE_BYTES
        if path.stat().st_size > limit:
            raise ModelError(f"{path} is larger than {limit:,} bytes", fix=_FIX)
        os.symlink(path.resolve(), own / name)
    for name, clean in _CLEANED.items():
        if (folder / name).is_file():
            values = clean(_read_object(folder / name), folder)
            (own / name).write_text(json.dumps(values), encoding="utf-8")


def _read_object(path: Path) -> dict[str, Any]:
    try:
        values = read_json(path)
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}", fix=_FIX) from None
    if not isinstance(values, dict):
        raise ModelError(f"{path} is no object", fix=_FIX)
    return values


def _tokenizer_values(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What tokenizer_config.json says of tokens; a class that transformers does not have is any."""
    name = values.get("tokenizer_class")
    is_known = isinstance(name, str) and name.removesuffix("Fast") in _known_classes()
    if values.get("auto_map") and not is_known:
        raise ModelError(
            f"{folder / CONFIG_FILE} asks for a tokenizer of its own code ({str(name)[:80]!r}), "
            "which is never run",
            fix="use a model with a tokenizer.json that transformers reads by itself",
        )
    tokens = {key: value for key, value in values.items() if _is_token(key, value)}
    kept = plain_values({key: value for key, value in values.items() if key not in tokens})
    template = values.get("chat_template")
    if isinstance(template, str) and len(template) > LARGEST_TEMPLATE_BYTES:
        raise ModelError(f"{folder / CONFIG_FILE}: the chat template is too large", fix=_FIX)
    if name is not None:
        kept["tokenizer_class"] = name if is_known else _ANY_CLASS
    return {**kept, **tokens}


def _model_type(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Of config.json only the architecture, which decides between tokenizer classes."""
    kind = values.get("model_type")
    return {"model_type": kind} if isinstance(kind, str) and kind in CONFIG_MAPPING else {}


def _as_they_are(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    return dict(values)


def _is_token(key: str, value: Any) -> bool:
    is_token = key.endswith("_token") and not key.startswith("_")
    return key in _TEXTS or (is_token and isinstance(value, str | dict | None))


def _known_classes() -> set[str]:
    """Names without "Fast"; any other name of transformers may be that of a model or a loader."""
    names = {str(name).removesuffix("Fast") for name in TOKENIZER_MAPPING_NAMES.values() if name}
    return {*names, "PreTrainedTokenizer"} - {"RagTokenizer"}


_CLEANED: dict[str, Callable[[Mapping[str, Any], Path], dict[str, Any]]] = {
    "config.json": _model_type,
    CONFIG_FILE: _tokenizer_values,
    **dict.fromkeys(_TABLES, _as_they_are),
}
