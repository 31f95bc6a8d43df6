"""adapter_config.json: the keys that decide what an adapter computes, checked.

A key that nibble does not know is refused, unless its value turns it off: to leave it out would
compute something else in silence. An adapter is given by its folder or by that of its run.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nibble.errors import AdapterError, ModelError
from nibble.model.folder import check_files, read_json

CONFIG_FILE = "adapter_config.json"

# Keys that decide what nibble computes, that only say where the factors came from, or that choose
# layers, which the names of the tensors do.
_KNOWN = {
    "peft_type", "task_type", "base_model_name_or_path", "revision", "r", "lora_alpha",
    "lora_dropout", "use_rslora", "inference_mode", "target_modules", "target_parameters",
    "layers_to_transform", "layers_pattern", "auto_mapping", "peft_version", "qalora_group_size",
    "runtime_config",
}  # fmt: skip
# Any other key belongs to a feature that nibble does not compute, unless its value turns it off.
_OFF: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "megatron_core": ("megatron.core",),
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva"),
}
_LARGEST_RANK = 65_536
_FIX = "copy the folder again from where it was made"


@dataclass(frozen=True)
class AdapterConfig:
    """The part of adapter_config.json that decides the arithmetic."""

    rank: int
    alpha: float
    dropout: float
    rslora: bool
    base: str
    revision: str | None


def adapter_folder(path: str | Path) -> Path:
    """The adapter folder: the given one, or that of the run that is given."""
    inner = Path(path) / "adapter"
    return inner if (inner / CONFIG_FILE).is_file() else Path(path)


def read_adapter_config(folder: Path) -> AdapterConfig:
    """The checked content of adapter_config.json.

    Raises:
        AdapterError: If a file is missing or broken, leaves the folder, or asks for a feature
            that nibble does not compute.
    """
    folder = adapter_folder(folder)
    path = folder / CONFIG_FILE
    if not folder.is_dir():
        raise AdapterError(f"there is no adapter folder {folder}", fix="check the path")
    try:
        check_files(folder)
        config = read_json(path)
    except FileNotFoundError:
        raise AdapterError(
            f"{folder} holds no {CONFIG_FILE}", fix="give the folder that `nibble train` wrote"
        ) from None
    except ModelError as error:
        raise AdapterError(error.what, fix=error.fix) from None
    except ValueError as error:
        raise AdapterError(f"{path} is not valid JSON: {error}", fix=_FIX) from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise AdapterError(
            f"{path}: peft_type is {str(kind)[:80]!r}, expected 'LORA'", fix="use a LoRA adapter"
        )
    for key, value in config.items():
        if key not in _KNOWN and value and value not in _OFF.get(key, ()):
            raise AdapterError(
                f"{path}: {key[:80]} = {repr(value)[:80]} is not supported",
                fix="merge this adapter with the tool that made it",
            )
    return _adapter_config(path, config)


def _adapter_config(path: Path, config: Mapping[str, Any]) -> AdapterConfig:
    rank, alpha = config.get("r"), config.get("lora_alpha")
    dropout, rslora = config.get("lora_dropout") or 0.0, config.get("use_rslora") or False
    expected = {
        f"r from 1 to {_LARGEST_RANK}": type(rank) is int and 1 <= rank <= _LARGEST_RANK,
        "lora_alpha a finite number": _is_finite(alpha),
        "lora_dropout at least 0 and below 1": _is_finite(dropout) and 0 <= dropout < 1,
        "use_rslora true or false": isinstance(rslora, bool),
    }
    for what, is_right in expected.items():
        if not is_right:
            key = what.split()[0]
            raise AdapterError(
                f"{path}: {key} is {repr(config.get(key))[:80]}, expected {what}", fix=_FIX
            )
    revision = config.get("revision")
    return AdapterConfig(
        rank=config["r"],
        alpha=float(config["lora_alpha"]),
        dropout=float(dropout),
        rslora=rslora,
        base=str(config.get("base_model_name_or_path") or ""),
        revision=None if revision is None else str(revision),
    )


def _is_finite(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # Beyond 2**53 an integer may be no float at all; NaN compares as false.
    return is_number and abs(value) <= 2**53
