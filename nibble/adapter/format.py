"""Write and read an adapter folder in the PEFT format, strictly.

    adapter_config.json         rank, alpha, targets, base
    adapter_model.safetensors   base_model.model.<layer>.lora_A.weight (R, I), .lora_B.weight (O, R)

The metadata of the second say how the base was kept in training, which the first has no key for.
Reading runs no code: known keys, safetensors only, right shapes, finite values.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nibble.adapter.card import model_card
from nibble.adapter.config import (
    CONFIG_FILE,
    AdapterConfig,
    adapter_folder,
    read_adapter_config,
)
from nibble.disk import disk_errors, fault, remove, rename, replace_file, sync_tree
from nibble.errors import AdapterError, ModelError, UsageError
from nibble.model.adapt import AdaptedLayers, adapt, frozen_linear, linear_layers
from nibble.model.experts import Experts
from nibble.model.linear4bit import DenseLinear, Linear4bit
from nibble.model.lora import LoRALinear
from nibble.model.tensors import (
    Entry,
    TensorReader,
    read_entries,
    read_metadata,
    write_tensors,
)

WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
_BASE_KEY = "nibble.base"
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

_FIX = "copy the folder again from where it was made"


@dataclass(frozen=True)
class StoredAdapter:
    """What an adapter folder holds, checked.

    Args:
        config: What decides the arithmetic.
        layers: The adapted layers, in the order of the file.
        tensors: The factors, by their keys in the file.
    """

    config: AdapterConfig
    layers: tuple[str, ...]
    tensors: Mapping[str, Tensor]


def write_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    base: str = "",
    revision: str | None = None,
    card: str = "",
) -> Path:
    """Write the adapter of `model` so that PEFT, vLLM and others can load it.

    Args:
        tokenizer: Saved beside the weights with its chat template when given.
        base: Hub id or folder of the base; empty takes the name the model was loaded by.
        card: Text of README.md; empty writes a short one.

    Raises:
        UsageError: If the model carries no adapter.
        DiskError: If a file cannot be written.
    """
    folder = Path(folder)
    tensors = {key: [factor] for key, factor in adapter_tensors(model)}
    if not tensors:
        raise UsageError("the model carries no adapter", fix="call nibble.adapt(model) first")
    base = base or str(getattr(model, "name_or_path", ""))
    config = _config_of(model, base, revision)
    temporary = folder / f".{WEIGHTS_FILE}.tmp"
    with disk_errors(f"cannot write the adapter {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        replace_file(folder / "README.md", (card or model_card(base)).encode())
        replace_file(folder / CONFIG_FILE, (json.dumps(config, indent=2) + "\n").encode())
        remove(temporary)
        write_tensors(temporary, tensors, _metadata_of(model))
        rename(temporary, folder / WEIGHTS_FILE)
        sync_tree(folder)
    fault("adapter.after_write")
    return folder


def read_adapter(model: nn.Module, folder: str | Path) -> AdaptedLayers:
    """Adapt `model` as the folder says, and load its factors.

    Raises:
        AdapterError: If a file is missing or broken, a feature is unknown, or a tensor does not
            fit the model, which is left as it was.
    """
    stored = read_factors(folder, linear_layers(model))
    config = stored.config
    adapted = adapt(
        model,
        rank=config.rank,
        alpha=config.alpha,
        dropout=config.dropout,
        target=stored.layers,
        rslora=config.rslora,
    )
    with torch.no_grad():
        for key, parameter in adapter_tensors(model):
            parameter.copy_(stored.tensors[key])
    return adapted


def read_base_options(folder: str | Path) -> dict[str, Any]:
    """How the base was kept in training, as arguments of `load_base`; empty if nobody says so.

    Raises:
        AdapterError: If the file is missing or broken.
    """
    folder = adapter_folder(folder)
    read_adapter_config(folder)
    path = folder / WEIGHTS_FILE
    _read_entries(path)
    text = read_metadata(path).get(_BASE_KEY)
    if text is None:
        return {}
    try:
        values = json.loads(text)
        dtype, quant = _DTYPES[values["dtype"]], dict(values["quant"])
        return {"storage": str(values["storage"]), "dtype": dtype, "quant": quant}
    except (ValueError, TypeError, KeyError) as error:
        raise AdapterError(f"{path}: {_BASE_KEY} is broken: {error!r}", fix=_FIX) from None


def _metadata_of(model: nn.Module) -> dict[str, str]:
    options: dict[str, Any] = dict(getattr(model, "base_options", {}))
    if not options:
        return {"format": "pt"}
    options["dtype"] = str(options["dtype"]).removeprefix("torch.")
    return {"format": "pt", _BASE_KEY: json.dumps(options)}


def read_factors(folder: str | Path, known: Mapping[str, nn.Module]) -> StoredAdapter:
    """The content of an adapter folder, after it was checked against the layers of a model.

    Args:
        known: The layers that can be adapted, by name.

    Raises:
        AdapterError: As `read_adapter`.
    """
    folder = adapter_folder(folder)
    config = read_adapter_config(folder)
    entries = _read_entries(folder / WEIGHTS_FILE)
    layers = list(dict.fromkeys(_layer_of(key, known) for key in entries))
    _check_layers(layers, known, folder)
    shapes = {k: s for name in layers for k, s in _factors(name, known[name], config.rank)}
    _check_keys(set(shapes), set(entries), folder)
    # Before anything is made: a rank that the factors do not have would only fill memory.
    _check_shapes(entries, shapes, folder)
    return StoredAdapter(config, tuple(layers), _read_finite(folder / WEIGHTS_FILE, entries))


def _read_finite(path: Path, entries: Mapping[str, Entry]) -> dict[str, Tensor]:
    reader = TensorReader([])
    tensors = {key: reader.read(entry) for key, entry in entries.items()}
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"{path}: {key} holds values that are not finite", fix=_FIX)
    return tensors


def adapter_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every factor of `model` with its key in the file."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield f"{PREFIX}{name}.lora_A.weight", module.lora_A
            yield f"{PREFIX}{name}.lora_B.weight", module.lora_B
        elif isinstance(module, Experts):
            for key, factor in module.adapter_tensors():
                yield f"{PREFIX}{name}.{key}", factor


def _config_of(model: nn.Module, base: str, revision: str | None) -> dict[str, Any]:
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}
    experts = {n: m for n, m in model.named_modules() if isinstance(m, Experts) and m.has_lora}
    rank, alpha, dropout, rslora = _shape_of_update(layers, experts)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "use_rslora": rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": _target_modules(list(layers), model) or None,
        "target_parameters": [p for n, m in experts.items() for p in m.target_parameters(n)]
        or None,
    }


def _shape_of_update(
    layers: Mapping[str, LoRALinear], experts: Mapping[str, Experts]
) -> tuple[int, float, float, bool]:
    if layers:
        first = next(iter(layers.values()))
        # The format refuses dropout beside experts, and training alone has a use for it.
        dropout = 0.0 if experts else first.dropout
        return first.lora_A.shape[0], first.alpha, dropout, first.rslora
    only = next(iter(experts.values()))
    return only.rank, only.alpha, 0.0, only.rslora


def _target_modules(adapted: list[str], model: nn.Module) -> list[str]:
    """Last name segments where they pick exactly the adapted layers, whole names otherwise."""
    segments = sorted({name.rpartition(".")[2] for name in adapted})
    kinds = (nn.Linear, DenseLinear, Linear4bit, LoRALinear)
    everything = [n for n, m in model.named_modules() if isinstance(m, kinds)]
    picked = [n for n in everything if n.rpartition(".")[2] in segments]
    return segments if set(picked) == set(adapted) else sorted(adapted)


def _read_entries(path: Path) -> dict[str, Entry]:
    if not path.is_file():
        pickled = path.with_name("adapter_model.bin")
        fix = "convert adapter_model.bin to safetensors" if pickled.exists() else _FIX
        raise AdapterError(f"{path.parent} holds no {WEIGHTS_FILE}", fix=fix)
    try:
        entries = read_entries(path)
    except ModelError as error:
        raise AdapterError(f"{path.parent} is broken: {error.what}", fix=_FIX) from None
    if not entries:
        raise AdapterError(f"{path} holds no factors", fix=_FIX)
    return entries


def _layer_of(key: str, known: Mapping[str, nn.Module]) -> str:
    name = key.removeprefix(PREFIX)
    for suffix in (".lora_A.weight", ".lora_B.weight"):
        if key.startswith(PREFIX) and name.endswith(suffix):
            layer = name.removesuffix(suffix)
            while layer.endswith(".base_layer") and layer not in known:
                layer = layer.removesuffix(".base_layer")
            return layer
    raise AdapterError(
        f"{WEIGHTS_FILE} holds {key!r}, which is no LoRA factor",
        fix="nibble reads adapters with lora_A and lora_B of linear layers only",
    )


def _check_layers(layers: list[str], known: Mapping[str, nn.Module], folder: Path) -> None:
    missing = [name for name in layers if name not in known]
    if missing:
        raise AdapterError(
            f"{folder} adapts {missing[0]!r}, which the model does not have "
            f"({len(missing)} of {len(layers)} layers)",
            fix="use the base that the adapter was trained on",
        )


def _check_keys(expected: set[str], found: set[str], folder: Path) -> None:
    if expected != found:
        wrong = sorted(expected ^ found)
        state = "lacks" if wrong[0] in expected else "has an unexpected"
        raise AdapterError(f"{folder / WEIGHTS_FILE} {state} {wrong[0]!r}", fix=_FIX)


def _factors(name: str, layer: nn.Module, rank: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """The keys of a layer's factors, and their shapes."""
    if isinstance(layer, Experts):
        for key, shape in layer.adapter_shapes(rank):
            yield f"{PREFIX}{name}.{key}", shape
        return
    linear = frozen_linear(layer)
    yield f"{PREFIX}{name}.lora_A.weight", (rank, linear.in_features)
    yield f"{PREFIX}{name}.lora_B.weight", (linear.out_features, rank)


def _check_shapes(
    entries: Mapping[str, Entry], shapes: Mapping[str, tuple[int, int]], folder: Path
) -> None:
    for key, entry in entries.items():
        if entry.shape != shapes[key]:
            raise AdapterError(
                f"{folder / WEIGHTS_FILE}: {key} has shape {entry.shape}, expected {shapes[key]}",
                fix="use the base that the adapter was trained on",
            )
        if not entry.dtype.is_floating_point or entry.dtype.itemsize < 2:
            raise AdapterError(
                f"{folder / WEIGHTS_FILE}: {key} is of {entry.dtype}, expected 16 or 32 bits",
                fix=_FIX,
            )
