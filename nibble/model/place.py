"""Put loaded weights into a model: checked, in the storage that is asked for, and frozen."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from nibble.errors import ModelError
from nibble.kernels.nf4 import Quantized, quantize_parts
from nibble.kernels.target import device_type
from nibble.model.experts import PARTS, Experts, is_experts
from nibble.model.host_embedding import HostEmbedding, keep_embeddings_on_host
from nibble.model.linear4bit import DenseLinear, Linear4bit
from nibble.model.names import tied_names
from nibble.model.tensors import check_finite

# Linear layers that choose experts: small, and every later layer hangs on their choice.
_ROUTERS = ("gate", "router", "shared_expert_gate")


@dataclass(frozen=True)
class Storage:
    """How weights are kept.

    Args:
        dtype: Type of all that is not in 4 bits.
        is_trainable: Leave transformers' own layers in place, with gradients.
        quant: Arguments of `quantize` for linear layers and experts; None keeps them in `dtype`.
        kept: Layers that stay in `dtype` all the same: first or last parts of their names.
        host_embeddings: Leave token embeddings in host memory where the rest goes to a device.
    """

    dtype: torch.dtype
    is_trainable: bool = False
    quant: Mapping[str, Any] | None = None
    kept: tuple[str, ...] = ()
    host_embeddings: bool = False


class Placer:
    """Takes a model's weights one by one, in any order; `finish` when all were placed."""

    def __init__(self, model: PreTrainedModel, storage: Storage, device: torch.device) -> None:
        self.model, self.storage, self.device = model, storage, device
        if storage.host_embeddings and device_type(device) == "cuda":
            keep_embeddings_on_host(model)
        self._head = model.get_output_embeddings()
        tensors = model.state_dict(keep_vars=True)
        self._shapes = {name: tuple(t.shape) for name, t in tensors.items()}
        self._expert_parts: dict[str, dict[str, Tensor | Quantized]] = {}

    def needs_copy(self, name: str) -> bool:
        """Whether the tensor given to `place` under this name becomes part of the model."""
        path = f".{name.rpartition('.')[0]}."
        is_kept = any(
            path.startswith(f".{k}.") or path.endswith(f".{k}.") for k in self.storage.kept
        )
        if self.storage.quant is None or is_kept:
            return True
        return not (self._is_linear_weight(name) or self._is_expert_part(name))

    def place(self, name: str, value: Tensor) -> None:
        """Store one parameter or buffer.

        Raises:
            ModelError: If its type or shape is wrong, or it holds NaN.
        """
        self.place_parts(name, [lambda: value])

    def place_parts(self, name: str, parts: Sequence[Callable[[], Tensor]]) -> None:
        """Store one parameter that comes in equal slices of its first dimension.

        Raises:
            ModelError: As `place`.
        """
        readers = [partial(self._read, name, read, len(parts)) for read in parts]
        if self.needs_copy(name):
            self._place_dense(name, readers)
        elif self._is_expert_part(name):
            self._place_expert_part(name, self._quantize(self._shapes[name], readers))
        else:
            is_transposed = isinstance(self._owner(name), Conv1D)
            value = _joined(readers)
            weight = value.T.contiguous() if is_transposed else value
            self.place_quantized(name, self._quantize(tuple(weight.shape), [lambda: weight]))

    def place_quantized(self, name: str, q: Quantized) -> None:
        """Store the 4-bit weight of a linear layer.

        Raises:
            ModelError: If there is no such layer, or the shape is wrong.
        """
        layer = self._owner(name) if name in self._shapes else None
        if not self._is_linear_weight(name):
            raise ModelError(
                f"{name} is stored in 4 bits, but is no weight of a linear layer",
                fix="load the 16-bit checkpoint instead",
            )
        rows, columns = self._shapes[name]
        expected = (columns, rows) if isinstance(layer, Conv1D) else (rows, columns)
        if q.shape != expected:
            raise ModelError(
                f"the 4-bit weight {name} has shape {q.shape}, expected {expected}",
                fix="config.json and weights must be of one model",
            )
        replacement = Linear4bit(_to(q, self.device), getattr(layer, "bias", None))
        self.model.set_submodule(name.rpartition(".")[0], replacement)

    def finish(self) -> None:
        """Tie what is tied, wrap what stays in 16 bits, freeze, and check that all is there."""
        self.model.tie_weights()
        if not self.storage.is_trainable:
            self._wrap()
        for name, buffer in self.model.named_buffers():
            self._owner(name)._buffers[name.rpartition(".")[2]] = buffer.to(self.device)
        self.model.requires_grad_(self.storage.is_trainable)
        tensors = [*self.model.named_parameters(), *self.model.named_buffers()]
        empty = [name for name, tensor in tensors if tensor.is_meta]
        if empty:
            raise ModelError(
                f"the checkpoint lacks {', '.join(empty[:5])}", fix="download the model again"
            )

    def _read(self, name: str, read: Callable[[], Tensor], num_parts: int) -> Tensor:
        """One slice, checked."""
        value, expected = read(), self._shapes[name]
        found = tuple(value.shape)
        if num_parts > 1 and found:
            found = (num_parts * found[0], *found[1:])
        if found != expected:
            raise ModelError(
                f"the weight {name} has shape {found}, expected {expected}",
                fix="config.json and weights must be of one model",
            )
        if not value.is_floating_point() or value.dtype.itemsize == 1:
            raise ModelError(
                f"the weight {name} is stored as {str(value.dtype).removeprefix('torch.')}, "
                "expected a floating-point type of 16 bits or more",
                fix="use a checkpoint that is not quantised",
            )
        check_finite(name, value)
        return value

    def _quantize(self, shape: tuple[int, ...], parts: Sequence[Callable[[], Tensor]]) -> Quantized:
        settings = dict(self.storage.quant or {})
        is_aligned = prod(shape) % (len(parts) * settings["block_size"]) == 0
        readers = parts if is_aligned else [partial(_joined, parts)]
        return quantize_parts(readers, shape, **settings)

    def _place_dense(self, name: str, parts: Sequence[Callable[[], Tensor]]) -> None:
        owner, key = self._owner(name), name.rpartition(".")[2]
        if key in owner._buffers:
            known, value = owner._buffers[key], _joined(parts)
            dtype = value.dtype if known is None else known.dtype
            owner._buffers[key] = value.to(self.device, dtype)
            return
        if isinstance(owner, HostEmbedding):
            owner.weight.copy_(_joined(parts))
            return
        value = _joined(parts, self.device, self.storage.dtype)
        if self._is_expert_part(name) and not self.storage.is_trainable:
            self._place_expert_part(name, value)
        else:
            owner._parameters[key] = nn.Parameter(value, requires_grad=False)

    def _place_expert_part(self, name: str, weight: Tensor | Quantized) -> None:
        path, _, key = name.rpartition(".")
        parts = self._expert_parts.setdefault(path, {})
        parts[key] = _to(weight, self.device) if isinstance(weight, Quantized) else weight
        if len(parts) == len(PARTS):
            experts = Experts(self.model.get_submodule(path), self._expert_parts.pop(path))
            self.model.set_submodule(path, experts)

    def _wrap(self) -> None:
        for name, module in list(self.model.named_modules()):
            if isinstance(module, nn.Linear | Conv1D) and module is not self._head:
                self.model.set_submodule(name, DenseLinear(module))

    def _is_linear_weight(self, name: str) -> bool:
        path, _, key = name.rpartition(".")
        layer = self._owner(name)
        is_linear = isinstance(layer, nn.Linear | Conv1D) and layer is not self._head
        return is_linear and key == "weight" and path.rpartition(".")[2] not in _ROUTERS

    def _is_expert_part(self, name: str) -> bool:
        return name.rpartition(".")[2] in PARTS and is_experts(self._owner(name))

    def _owner(self, name: str) -> nn.Module:
        return self.model.get_submodule(name.rpartition(".")[0])


def check_ties(model: PreTrainedModel, name: str, value: Tensor) -> None:
    """Raise ModelError if a tied parameter that is stored as well is another one."""
    source = tied_names(model)[name]
    if not torch.equal(model.get_parameter(source).cpu(), value.to(model.dtype)):
        raise ModelError(
            f"config.json ties {name} to {source}, but the checkpoint holds two different weights",
            fix="set tie_word_embeddings to false in config.json",
        )


def _joined(
    parts: Sequence[Callable[[], Tensor]],
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The parts behind one another in one tensor, each read when its place is ready."""
    first = parts[0]().to(device, dtype)
    if len(parts) == 1:
        return first
    whole = first.new_empty((len(parts) * len(first), *first.shape[1:]))
    whole[: len(first)] = first
    for number, read in enumerate(parts[1:], start=1):
        whole[number * len(first) : (number + 1) * len(first)] = read()
    return whole


def _to(q: Quantized, device: torch.device) -> Quantized:
    if device.type == "cpu":
        return q
    nested = None if q.nested_absmax is None else q.nested_absmax.to(device)
    offset = None if q.offset is None else q.offset.to(device)
    codes, absmax = q.codes.to(device), q.absmax.to(device)
    return Quantized(codes, absmax, nested, offset, q.shape, q.type, q.block_size)
