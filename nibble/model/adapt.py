"""Choose layers by name, wrap them, freeze the rest, count."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from nibble.errors import UsageError, did_you_mean
from nibble.model.experts import Experts, ExpertWeight
from nibble.model.ledger import count_parameters
from nibble.model.linear4bit import DenseLinear, Linear4bit
from nibble.model.lora import LoRALinear, lora_scale

Target = Literal["all-linear"] | Sequence[str]


@dataclass(frozen=True)
class AdaptedLayers:
    """What `adapt` did: the names of the adapted layers, and counts of values."""

    names: tuple[str, ...]
    num_trainable: int
    num_total: int

    @property
    def trainable_share(self) -> float:
        """Trained values over all values of base and adapters, in [0, 1]."""
        return self.num_trainable / self.num_total


def adapt(
    model: nn.Module,
    *,
    rank: int = 16,
    alpha: float = 32,
    dropout: float = 0.0,
    target: Target = "all-linear",
    dtype: torch.dtype = torch.float32,
    rslora: bool = False,
    generator: torch.Generator | None = None,
) -> AdaptedLayers:
    """Wrap the chosen layers of `model` in place, and freeze everything else.

    Experts of mixture models get factors of their own; dropout does not apply to them, since
    the adapter format has no place for it.

    Args:
        model: A base, as `load_base` gives it or any transformers model.
        target: "all-linear" (every linear layer but the head) or name suffixes such as "q_proj".
        dtype: Type of the stored factors.

    Raises:
        UsageError: If a suffix matches no layer, or the model is adapted already.
    """
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise UsageError("the model is adapted already", fix="load the base again")
    lora_scale(rank=rank, alpha=alpha, dropout=dropout, rslora=rslora)
    candidates = linear_layers(model)
    chosen = _choose(candidates, target)
    model.requires_grad_(False)
    for name in chosen:
        layer = candidates[name]
        if isinstance(layer, Experts):
            layer.add_lora(rank=rank, alpha=alpha, rslora=rslora, dtype=dtype, generator=generator)
            continue
        wrapped = LoRALinear(
            frozen_linear(layer),
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            rslora=rslora,
            generator=generator,
        )
        wrapped.lora_A.data = wrapped.lora_A.data.to(dtype)
        wrapped.lora_B.data = wrapped.lora_B.data.to(dtype)
        model.set_submodule(name, wrapped.train(layer.training))
    num_trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return AdaptedLayers(tuple(chosen), num_trainable, count_parameters(model))


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer that can be adapted, by name, in the order of the model; the head excepted."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    kinds = (nn.Linear, Conv1D, DenseLinear, Linear4bit, Experts)
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        is_part = any(name.startswith(f"{owner}.") for owner in found)
        if isinstance(module, kinds) and module is not head and not is_part:
            found[name] = module
    return found


def frozen_linear(layer: nn.Module) -> Any:
    """The layer as LoRALinear wants it: with `dense_weight`."""
    is_ready = isinstance(layer, DenseLinear | Linear4bit)
    return layer if is_ready else DenseLinear(cast(nn.Linear, layer))


def _choose(candidates: Iterable[str], target: Target) -> list[str]:
    names = list(candidates)
    if target == "all-linear":
        return names
    suffixes = [target] if isinstance(target, str) else list(target)
    for suffix in suffixes:
        if not any(_has_suffix(name, suffix) for name in names):
            known = dict.fromkeys(name.rpartition(".")[2] for name in names)
            close = did_you_mean(suffix, known)
            raise UsageError(
                f"lora.target: no linear layer is named {suffix!r}; the model has "
                f"{', '.join(known)}",
                fix=close or "name the last part of a layer, or use all-linear",
            )
    return [name for name in names if any(_has_suffix(name, suffix) for suffix in suffixes)]


def _has_suffix(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith(f".{suffix}")


@contextmanager
def updates_off(model: nn.Module) -> Iterator[None]:
    """Within the block every update counts nothing: the model is its base."""
    layers = [m for m in model.modules() if isinstance(m, LoRALinear | ExpertWeight)]
    scales = [layer.scale for layer in layers]
    for layer in layers:
        layer.scale = 0.0
    try:
        yield
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scale = scale
