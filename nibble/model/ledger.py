"""Every byte of a model by storage, and every value once."""

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor, nn

from nibble.model.experts import ExpertWeight
from nibble.model.host_embedding import HostEmbedding
from nibble.model.linear4bit import Linear4bit
from nibble.model.sharding import own_part

# Parts of a 4-bit weight: attribute -> name in the ledger.
_PARTS = {
    "codes": "codes",
    "absmax": "absmax",
    "nested_absmax": "nested absmax",
    "offset": "offsets",
}
_ROUTERS = ("gate", "router", "shared_expert_gate")


def resident_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes per kind of storage; they add up to all distinct storages of the model.

    A kind is a type and a use: "nf4 codes", "8-bit absmax", "float32 nested absmax",
    "float32 offsets", and "bfloat16" or "float32" of embeddings, head, linears, experts, norms,
    biases, routers, adapters and tables (rotary frequencies). What several layers share counts
    once, for the first of them: a tied head counts as embeddings.
    """
    found: dict[str, int] = {}
    for kind, tensor in stored_tensors(model):
        found[kind] = found.get(kind, 0) + tensor.untyped_storage().nbytes()
    return found


def count_parameters(model: nn.Module) -> int:
    """Number of values in base and adapters; a 4-bit weight counts its values, not its bytes."""
    seen: set[int] = set()
    total = 0
    for module in model.modules():
        if isinstance(module, Linear4bit):
            total += module.in_features * module.out_features
        elif isinstance(module, ExpertWeight) and module.quantized is not None:
            total += prod(module.shape)
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen and not _is_part(module, name):
                total += parameter.numel()
            seen.add(id(parameter))
    return total


def stored_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The kind of each distinct storage, and the first tensor that uses it."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for key, tensor in own:
            storage = own_part(tensor).untyped_storage()
            if storage.nbytes() and storage._cdata not in seen:
                seen.add(storage._cdata)
                yield _kind(model, name, key, tensor), own_part(tensor)


def _kind(model: nn.Module, name: str, key: str, tensor: Tensor) -> str:
    module = model.get_submodule(name)
    if isinstance(module, Linear4bit | ExpertWeight) and key in _PARTS:
        kind = "8-bit" if tensor.dtype == torch.uint8 else "float32"
        if key == "codes" and module.quantized is not None:
            kind = module.quantized.type
        return f"{kind} {_PARTS[key]}"
    return f"{str(tensor.dtype).removeprefix('torch.')} {_use(model, name, key, tensor)}"


def _use(model: nn.Module, name: str, key: str, tensor: Tensor) -> str:
    module = model.get_submodule(name)
    if key.startswith("lora_"):
        return "adapters"
    for getter, use in (("get_input_embeddings", "embeddings"), ("get_output_embeddings", "head")):
        if hasattr(model, getter) and module is getattr(model, getter)():
            return use
    if key in module._buffers:
        return "tables"
    if key.endswith("bias"):
        return "biases"
    if isinstance(module, nn.Embedding | HostEmbedding):
        return "embeddings"
    if name.rpartition(".")[2] in _ROUTERS:
        return "routers"
    if isinstance(module, ExpertWeight) or tensor.ndim == 3:
        return "experts"
    return "linears" if tensor.ndim == 2 else "norms"


def _is_part(module: nn.Module, key: str) -> bool:
    """Whether a parameter is a part of a 4-bit weight."""
    return isinstance(module, Linear4bit | ExpertWeight) and key in _PARTS
