"""What an adapter adds to each weight of a model, some rows at a time.

    rows(first, stop) = scale * B[first:stop] A        of a weight (O, I)

A weight of E experts counts as (E * O, I), expert after expert.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from nibble.adapter.format import PREFIX, StoredAdapter
from nibble.model.experts import PARTS, Experts, ExpertWeight, is_experts
from nibble.model.lora import lora_scale


@dataclass(frozen=True)
class Update:
    """The update of one stored weight, seen as a matrix.

    Args:
        factors: A (R, I) and B (O, R) of each part of O rows; the parts follow one another.
        scale: Of the product.
    """

    factors: tuple[tuple[Tensor, Tensor], ...]
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the weight."""
        return sum(len(lora_B) for _, lora_B in self.factors), self.factors[0][0].shape[1]

    def rows(self, first: int, stop: int) -> Tensor:
        """Rows of scale * B A in float32, (stop - first, I)."""
        found = torch.zeros(stop - first, self.shape[1])
        start = 0
        for lora_A, lora_B in self.factors:
            begin, end = max(first, start), min(stop, start + len(lora_B))
            if begin < end:
                lora_B_part = lora_B[begin - start : end - start].float() * self.scale
                torch.mm(lora_B_part, lora_A.float(), out=found[begin - first : end - first])
            start += len(lora_B)
        return found

    def part(self, first: int, stop: int) -> "Update":
        """The update of some rows, which lie in one part."""
        start = 0
        for lora_A, lora_B in self.factors:
            if start <= first and stop <= start + len(lora_B):
                return Update(((lora_A, lora_B[first - start : stop - start]),), self.scale)
            start += len(lora_B)
        raise ValueError(f"rows {first} to {stop} are of several parts")


def with_experts(model: nn.Module) -> nn.Module:
    """Put nibble's experts into a model without values, as `load_base` does with values."""
    for name, module in list(model.named_modules()):
        if is_experts(module):
            weights = {part: module.get_parameter(part).data for part in PARTS}
            model.set_submodule(name, Experts(module, dict(weights)))
    return model


def read_updates(model: nn.Module, stored: StoredAdapter) -> dict[str, Update]:
    """The update of each adapted weight, by the name that transformers gives the weight.

    Args:
        model: The base without values, after `with_experts`.
    """
    config = stored.config
    scale = lora_scale(
        rank=config.rank, alpha=config.alpha, dropout=config.dropout, rslora=config.rslora
    )
    updates: dict[str, Update] = {}
    for layer in stored.layers:
        module = model.get_submodule(layer)
        if isinstance(module, Experts):
            updates |= _updates_of_experts(layer, module, stored.tensors, scale)
            continue
        lora_A, lora_B = _pair(stored.tensors, f"{PREFIX}{layer}.")
        if isinstance(module, Conv1D):  # which keeps its weight as (I, O)
            lora_A, lora_B = lora_B.T, lora_A.T
        updates[f"{layer}.weight"] = Update(((lora_A, lora_B),), scale)
    return updates


def _updates_of_experts(
    layer: str, experts: Experts, tensors: Mapping[str, Tensor], scale: float
) -> dict[str, Update]:
    found: dict[str, Update] = {}
    for prefix, part in (("base_layer.", PARTS[0]), ("", PARTS[1])):
        lora_A, lora_B = _pair(tensors, f"{PREFIX}{layer}.{prefix}")
        weight: ExpertWeight = getattr(experts, part)
        num_experts, num_out, num_in = weight.shape
        lora_A_ERI = lora_A.view(num_experts, -1, num_in)
        lora_B_ORE = lora_B.view(num_out, -1, num_experts)
        pairs = zip(lora_A_ERI.unbind(0), lora_B_ORE.unbind(2), strict=True)
        found[f"{layer}.{part}"] = Update(tuple(pairs), scale)
    return found


def _pair(tensors: Mapping[str, Tensor], prefix: str) -> tuple[Tensor, Tensor]:
    return tensors[f"{prefix}lora_A.weight"], tensors[f"{prefix}lora_B.weight"]
