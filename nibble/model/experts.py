"""The experts of a mixture model: frozen 3-D weights in 16 or 4 bits, with updates of their own.

Takes the place of transformers' experts module and is called the same way. One expert at a time
is brought to 16 bits, and again in the backward pass; only experts that got a token cost anything.
"""

from collections.abc import Iterator
from math import prod, sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.integrations import moe

from nibble.kernels.few_rows import add_update_, few_rows_product, is_few
from nibble.kernels.few_rows_cpu import StoredWeight
from nibble.kernels.nf4 import Quantized, dequantize_slice
from nibble.model.linear4bit import scratch
from nibble.model.lora import lora_scale

PARTS = ("gate_up_proj", "down_proj")


def is_experts(module: nn.Module) -> bool:
    """Whether a transformers module holds all experts of a layer as (E, O, I) parameters."""
    has_parts = all(getattr(getattr(module, part, None), "ndim", 0) == 3 for part in PARTS)
    has_more = len(list(module.parameters())) != len(PARTS)
    is_other = getattr(module, "is_transposed", False) or not hasattr(module, "act_fn")
    is_interleaved = not getattr(module, "is_concatenated", True)
    # transformers gives a class without a gate function of its own a shared one; others clamp.
    gate: Any = getattr(module, "_apply_gate", None)
    is_gated_otherwise = gate is not None and gate.__func__ is not getattr(
        moe, "_default_apply_gate", 0
    )
    return has_parts and not (has_more or is_other or is_interleaved or is_gated_otherwise)


class ExpertWeight(nn.Module):
    """One frozen weight of all E experts, and a rank-R update per expert once it has one.

        y = x W_e^T + scale * x A_e^T B_e^T

    Shapes:
        weight, or the shape of the stored one: (E, O, I). lora_A: (E * R, I), expert by expert:
        A_e = lora_A[e * R : (e + 1) * R]. lora_B: (O, R * E), rank by rank: B_e = lora_B[:, e::E].

    Source:
        PEFT 0.21, `ParamWrapper`: the layout of the factors.
    """

    def __init__(self, weight: Tensor | Quantized) -> None:
        super().__init__()
        self.shape = tuple(weight.shape)
        self.scale = 0.0
        self._format: tuple[str, int] | None = None
        if isinstance(weight, Quantized):
            self._format = weight.type, weight.block_size
            for name in ("codes", "absmax", "nested_absmax", "offset"):
                tensor = getattr(weight, name)
                value = None if tensor is None else nn.Parameter(tensor, requires_grad=False)
                self.register_parameter(name, value)
        else:
            self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_parameter("lora_A", None)
        self.register_parameter("lora_B", None)

    @property
    def quantized(self) -> Quantized | None:
        """The stored weight; None where it is kept in 16 bits."""
        if self._format is None:
            return None
        own: Any = self
        kind, block_size = self._format
        parts = (own.codes, own.absmax, own.nested_absmax, own.offset)
        return Quantized(*parts, shape=self.shape, type=kind, block_size=block_size)

    def dense_weight(self, expert: int, dtype: torch.dtype) -> Tensor:
        """The (O, I) weight of one expert, valid until the next call on this device."""
        q = self.quantized
        if q is None:
            return self.weight[expert].to(dtype)
        out = scratch(q.codes.device, dtype, prod(self.shape[1:]))
        return dequantize_slice(q, expert, dtype=dtype, out=out)

    def _weight_of(self, expert: int) -> Tensor | StoredWeight:
        """The weight of one expert as it is stored."""
        q = self.quantized
        if q is None:
            return self.weight[expert]
        num_out = self.shape[1]
        return StoredWeight(q, slice(expert * num_out, (expert + 1) * num_out))

    def use_factors(self, lora_A: Tensor | None, lora_B: Tensor | None, scale: float) -> None:
        """Compute with these frozen factors of all experts, or with none, from now on."""
        for name, factor in (("lora_A", lora_A), ("lora_B", lora_B)):
            value = None if factor is None else nn.Parameter(factor, requires_grad=False)
            self.register_parameter(name, value)
        self.scale = scale

    def factors(self) -> list[tuple[Tensor, Tensor]]:
        """Every expert's A (R, I) and B (O, R); nothing without an update."""
        if self.lora_A is None or self.lora_B is None:
            return []
        num_experts, num_out, num_in = self.shape
        lora_A_ERI = self.lora_A.view(num_experts, -1, num_in)
        lora_B_ORE = self.lora_B.view(num_out, -1, num_experts)
        # Unbound once: taken one by one, each would cost a gradient of the whole size.
        return list(zip(lora_A_ERI.unbind(0), lora_B_ORE.unbind(2), strict=True))

    def add_lora(
        self, *, rank: int, scale: float, dtype: torch.dtype, generator: torch.Generator | None
    ) -> None:
        """An update that is zero at first: A uniform in +-1/sqrt(I), B zero."""
        num_experts, num_out, num_in = self.shape
        device = next(self.parameters()).device
        lora_A = torch.empty(num_experts * rank, num_in)
        lora_A.uniform_(-1 / sqrt(num_in), 1 / sqrt(num_in), generator=generator)
        self.lora_A = nn.Parameter(lora_A.to(device, dtype))
        lora_B = torch.zeros(num_out, rank * num_experts, device=device, dtype=dtype)
        self.lora_B, self.scale = nn.Parameter(lora_B), scale

    def forward(self, x: Tensor, expert: int, factors: list[tuple[Tensor, Tensor]]) -> Tensor:
        """(T, I) -> (T, O) for the tokens of one expert; `factors` as `factors()` gives them."""
        if is_few(x):
            y: Any = few_rows_product(x, self._weight_of(expert))
        else:
            y = _ExpertProduct.apply(x, self, expert)
        if not factors:
            return y
        lora_A, lora_B = factors[expert]
        if is_few(x):
            add_update_(y, x, lora_A, lora_B.T, self.scale)
            return y
        return y + (x @ lora_A.to(x.dtype).T) @ (lora_B * self.scale).to(x.dtype).T


class Experts(nn.Module):
    """All experts of a layer; the router stands outside.

        out_t = sum over the chosen experts e of w_te * down_e(act(gate_e x_t) * up_e x_t)

    Args:
        module: transformers' experts module, for its activation.
        weights: By name, the (E, 2F, D) gate-and-up weight and the (E, D, F) down weight.
    """

    def __init__(self, module: Any, weights: dict[str, Tensor | Quantized]) -> None:
        super().__init__()
        self.act_fn = module.act_fn
        self.gate_up_proj = ExpertWeight(weights["gate_up_proj"])
        self.down_proj = ExpertWeight(weights["down_proj"])
        self.num_experts = self.gate_up_proj.shape[0]
        self.rank, self.alpha, self.rslora = 0, 0.0, False

    @property
    def has_lora(self) -> bool:
        """Whether `add_lora` was called."""
        return self.rank > 0

    def add_lora(
        self,
        *,
        rank: int,
        alpha: float,
        rslora: bool = False,
        dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
    ) -> None:
        """Give every expert an update of rank R that is zero at first; without dropout."""
        scale = lora_scale(rank=rank, alpha=alpha, dropout=0.0, rslora=rslora)
        self.rank, self.alpha, self.rslora = rank, alpha, rslora
        for weight in (self.gate_up_proj, self.down_proj):
            weight.add_lora(rank=rank, scale=scale, dtype=dtype, generator=generator)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(T, D), chosen experts (T, k) and their weights (T, k) -> (T, D)."""
        gate_up_factors, down_factors = self.gate_up_proj.factors(), self.down_proj.factors()
        out_TD = torch.zeros_like(hidden_states)
        for expert, tokens, places in _routes(top_k_index, self.num_experts):
            gate_up = self.gate_up_proj(hidden_states[tokens], expert, gate_up_factors)
            gate, up = gate_up.chunk(2, dim=-1)
            y = self.down_proj(self.act_fn(gate) * up, expert, down_factors)
            y = y * top_k_weights[tokens, places, None]
            out_TD.index_add_(0, tokens, y.to(out_TD.dtype))
        return out_TD

    def adapter_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Factors with PEFT's keys: its wrappers nest, that of the last parameter outermost."""
        for prefix, weight in (("base_layer.", self.gate_up_proj), ("", self.down_proj)):
            if weight.lora_A is not None and weight.lora_B is not None:
                yield f"{prefix}lora_A.weight", weight.lora_A
                yield f"{prefix}lora_B.weight", weight.lora_B

    def adapter_shapes(self, rank: int) -> Iterator[tuple[str, tuple[int, int]]]:
        """The keys of `adapter_tensors` and the shapes of factors of this rank."""
        for prefix, weight in (("base_layer.", self.gate_up_proj), ("", self.down_proj)):
            num_experts, num_out, num_in = weight.shape
            yield f"{prefix}lora_A.weight", (num_experts * rank, num_in)
            yield f"{prefix}lora_B.weight", (num_out, rank * num_experts)

    def target_parameters(self, name: str) -> list[str]:
        """What adapter_config.json lists for this module."""
        return [f"{name}.{part}" for part in PARTS]


class _ExpertProduct(torch.autograd.Function):
    """y = x W_e^T for a frozen expert; saves no tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: ExpertWeight, expert: int) -> Tensor:
        ctx.weight, ctx.expert = weight, expert
        return F.linear(x, weight.dense_weight(expert, x.dtype))

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_y: Tensor
    ) -> tuple[Tensor, None, None]:
        return grad_y @ ctx.weight.dense_weight(ctx.expert, grad_y.dtype), None, None


def _routes(top_k_index: Tensor, num_experts: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Each expert that got tokens, with their rows and columns in `top_k_index`.

    [[2, 0], [2, 1]] -> (0, [0], [1]), (1, [1], [1]), (2, [0, 1], [0, 0]). Numbers of `num_experts`
    and above choose none.
    """
    flat = top_k_index.flatten()
    order = flat.argsort(stable=True)
    counts = flat.bincount(minlength=num_experts).tolist()
    start = 0
    for expert, count in enumerate(counts[:num_experts]):
        if count:
            chosen = order[start : start + count]
            yield expert, chosen // top_k_index.shape[1], chosen % top_k_index.shape[1]
        start += count
