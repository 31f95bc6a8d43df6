"""Every byte of a loaded model by storage, and every value by kind."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from nibble.model.experts import ExpertWeight
from nibble.model.linear4bit import Linear4bit


def resident_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes per kind of storage, each storage counted once; they add up to the model.

    For example {"nf4 codes": 3238002688, "8-bit scales": ..., "bfloat16 embeddings": ...}.
    """
    found: dict[str, int] = {}
    for kind, tensor in _tensors(model):
        found[kind] = found.get(kind, 0) + tensor.untyped_storage().nbytes()
    return found


def count_parameters(model: nn.Module) -> int:
    """Number of values in base and adapters; a 4-bit weight counts its values, not its bytes."""
    seen: set[int] = set()
    total = 0
    for module in model.modules():
        if isinstance(module, Linear4bit):
            total += module.in_features * module.out_features
        elif isinstance(module, ExpertWeight) and module.quant is not None:
            total += math.prod(module.shape)
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen and not _is_storage(module, name):
                total += parameter.numel()
            seen.add(id(parameter))
    return total


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every distinct storage with its kind; tied weights come once, as embeddings."""
    seen: set[int] = set()
    embeddings = _layer(model, "get_input_embeddings")
    head = _layer(model, "get_output_embeddings")
    for name, module in model.named_modules():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for key, tensor in own:
            pointer = tensor.untyped_storage().data_ptr()
            if pointer in seen or tensor.numel() == 0:
                continue
            seen.add(pointer)
            if module is embeddings:
                kind = "embeddings"
            elif module is head:
                kind = "head"
            else:
                kind = _kind(name, module, key, tensor)
            yield _named(kind, tensor), tensor


def _kind(name: str, module: nn.Module, key: str, tensor: Tensor) -> str:
    if _is_storage(module, key):
        return "codes" if key == "codes" else "scales"
    if "lora_" in key:
        return "adapters"
    if isinstance(module, ExpertWeight) or key == "weight" and tensor.ndim >= 2:
        is_router = name.endswith((".gate", ".router"))
        return "routers" if is_router else "linears"
    if key.endswith("bias"):
        return "biases"
    return "norms" if key == "weight" else "tables"


def _named(kind: str, tensor: Tensor) -> str:
    if kind == "codes":
        return "4-bit codes"
    dtype = "8-bit" if tensor.dtype == torch.uint8 else str(tensor.dtype).removeprefix("torch.")
    return f"{dtype} {kind}"


def _is_storage(module: nn.Module, key: str) -> bool:
    """Whether a parameter is a part of a 4-bit weight."""
    is_quantised = isinstance(module, Linear4bit | ExpertWeight)
    return is_quantised and key.endswith(("codes", "absmax", "offset"))


def _layer(model: nn.Module, getter: str) -> nn.Module | None:
    return getattr(model, getter)() if hasattr(model, getter) else None
