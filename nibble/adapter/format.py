"""Write and read an adapter folder in the PEFT format, strictly.

    adapter_config.json         rank, alpha, targets, base
    adapter_model.safetensors   base_model.model.<layer>.lora_A.weight (R, I), .lora_B.weight (O, R)

Reading runs no code: known keys, safetensors only, right shapes, finite values.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from nibble.disk import disk_errors, fault, remove, rename, replace_file, sync_tree
from nibble.errors import AdapterError, UsageError
from nibble.model.adapt import AdaptedLayers, adapt, linear_layers
from nibble.model.experts import Experts
from nibble.model.linear4bit import DenseLinear, Linear4bit
from nibble.model.lora import LoRALinear
from nibble.model.tensors import write_tensors

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."

# Features that change the arithmetic and that nibble does not compute.
_REFUSED = {
    "use_dora": False,
    "bias": "none",
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "layer_replication": None,
    "lora_bias": False,
    "trainable_token_indices": None,
    "use_qalora": False,
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "exclude_modules": None,
}


@dataclass(frozen=True)
class AdapterConfig:
    """The part of adapter_config.json that decides the arithmetic."""

    rank: int
    alpha: float
    dropout: float
    rslora: bool
    base: str
    revision: str | None


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
        write_tensors(temporary, tensors, {"format": "pt"})
        rename(temporary, folder / WEIGHTS_FILE)
        sync_tree(folder)
    fault("adapter.after_write")
    return folder


def read_adapter(model: nn.Module, folder: str | Path) -> AdaptedLayers:
    """Adapt `model` as the folder says, and load its factors.

    Raises:
        AdapterError: If a file is missing or broken, a feature is unknown, or a tensor does not
            fit the model.
    """
    folder = Path(folder)
    config = read_adapter_config(folder)
    tensors = _read_tensors(folder / WEIGHTS_FILE)
    modules = dict(model.named_modules())
    layers = list(dict.fromkeys(_layer_of(key, modules) for key in tensors))
    _check_layers(layers, linear_layers(model), folder)
    adapted = adapt(
        model,
        rank=config.rank,
        alpha=config.alpha,
        dropout=config.dropout,
        target=layers,
        rslora=config.rslora,
    )
    expected = dict(adapter_tensors(model))
    _check_keys(set(expected), set(tensors), folder)
    for key, parameter in expected.items():
        _check_tensor(key, tensors[key], parameter, folder)
        with torch.no_grad():
            parameter.copy_(tensors[key])
    return adapted


def adapter_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every factor of `model` with its key in the file."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield f"{PREFIX}{name}.lora_A.weight", module.lora_A
            yield f"{PREFIX}{name}.lora_B.weight", module.lora_B
        elif isinstance(module, Experts):
            for key, factor in module.adapter_tensors():
                yield f"{PREFIX}{name}.{key}", factor


def read_adapter_config(folder: Path) -> AdapterConfig:
    """The checked content of adapter_config.json."""
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(
            f"{folder} holds no {CONFIG_FILE}", fix="give the folder that `nibble train` wrote"
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise AdapterError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise AdapterError(f"{path}: peft_type is {kind!r}, expected 'LORA'")
    for key, harmless in _REFUSED.items():
        if config.get(key, harmless) not in (harmless, None):
            raise AdapterError(
                f"{path}: {key} = {config[key]!r} is not supported",
                fix="merge this adapter with the tool that made it",
            )
    try:
        return AdapterConfig(
            rank=int(config["r"]),
            alpha=float(config["lora_alpha"]),
            dropout=float(config.get("lora_dropout") or 0.0),
            rslora=bool(config.get("use_rslora", False)),
            base=str(config.get("base_model_name_or_path") or ""),
            revision=config.get("revision"),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterError(f"{path}: r, lora_alpha or lora_dropout is wrong: {error}") from None


def model_card(base: str, *, body: str = "") -> str:
    """README.md with the front matter that model hubs read."""
    lines = ["---", "library_name: peft", f"base_model: {json.dumps(base)}"]
    lines += ["base_model_relation: adapter", "pipeline_tag: text-generation"]
    lines += ["tags:", "- lora", "- nibble", "---", ""]
    return "\n".join([*lines, body or "A LoRA adapter trained with nibble.", ""])


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


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        pickled = path.with_name("adapter_model.bin")
        fix = "convert adapter_model.bin to safetensors" if pickled.exists() else ""
        raise AdapterError(f"{path.parent} holds no {WEIGHTS_FILE}", fix=fix)
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path} is broken: {error}", fix="copy the file again") from None


def _layer_of(key: str, modules: Mapping[str, nn.Module]) -> str:
    name = key.removeprefix(PREFIX)
    for suffix in (".lora_A.weight", ".lora_B.weight"):
        if key.startswith(PREFIX) and name.endswith(suffix):
            layer = name.removesuffix(suffix)
            while layer.endswith(".base_layer") and layer not in modules:
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
        raise AdapterError(f"{folder / WEIGHTS_FILE} {state} {wrong[0]!r}")


def _check_tensor(key: str, tensor: Tensor, parameter: Tensor, folder: Path) -> None:
    if tensor.shape != parameter.shape:
        raise AdapterError(
            f"{folder / WEIGHTS_FILE}: {key} has shape {tuple(tensor.shape)}, "
            f"expected {tuple(parameter.shape)}",
            fix="use the base that the adapter was trained on",
        )
    if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
        raise AdapterError(f"{folder / WEIGHTS_FILE}: {key} holds values that are not finite")
