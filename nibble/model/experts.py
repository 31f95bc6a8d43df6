"""The experts of a mixture model: frozen 3-D weights in 16 or 4 bits, with updates of their own.

Takes the place of transformers' experts module and is called the same way. One expert at a time
is brought to 16 bits, and again in the backward pass; only experts that got a token cost anything.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from nibble.kernels.nf4 import Quantized, dequantize_slice
from nibble.model.linear4bit import scratch

PARTS = ("gate_up_proj", "down_proj")


class ExpertWeight(nn.Module):
    """One frozen (E, O, I) weight, and a rank-R update per expert once it has one.

    Shapes:
        lora_A: (R * E, I), expert by expert. lora_B: (O, R * E), rank by rank: PEFT's layout.
    """

    def __init__(self, weight: Tensor | Quantized) -> None:
        super().__init__()
        self.shape = tuple(weight.shape)
        self.quant = None
        if isinstance(weight, Quantized):
            self.quant = (weight.type, weight.block_size)
            for name in ("codes", "absmax", "nested_absmax", "offset"):
                tensor = getattr(weight, name)
                value = None if tensor is None else nn.Parameter(tensor, requires_grad=False)
                self.register_parameter(name, value)
        else:
            self.weight = nn.Parameter(weight, requires_grad=False)
        self.lora_A: nn.Parameter | None = None
        self.lora_B: nn.Parameter | None = None
        self.scale = 0.0

    def dense(self, expert: int, dtype: torch.dtype) -> Tensor:
        """The (O, I) weight of one expert, valid until the next call."""
        if self.quant is None:
            return self.weight[expert].to(dtype)
        stored = Quantized(
            self.codes,
            self.absmax,
            self.nested_absmax,
            self.offset,
            self.shape,
            *self.quant,
        )
        out = scratch(self.shape[1:], dtype, self.codes.device)
        return dequantize_slice(stored, expert, out=out)

    def factors(self, expert: int) -> tuple[Tensor, Tensor]:
        """Views of one expert's A (R, I) and B (O, R)."""
        assert self.lora_A is not None and self.lora_B is not None
        num_experts = self.shape[0]
        lora_A = self.lora_A.view(num_experts, -1, self.shape[2])[expert]
        return lora_A, self.lora_B.view(self.shape[1], -1, num_experts)[:, :, expert]

    def forward(self, x: Tensor, expert: int) -> Tensor:
        """(T, I) -> (T, O)."""
        y = _ExpertProduct.apply(x, self, expert)
        if self.lora_A is None:
            return y
        lora_A, lora_B = self.factors(expert)
        return y + (x @ lora_A.to(x.dtype).T) @ (lora_B * self.scale).to(x.dtype).T


class Experts(nn.Module):
    """All experts of a layer.

        out_t = sum over the chosen experts e of w_te * down_e(act(gate_e(x_t)) * up_e(x_t))

    Args:
        module: transformers' experts module; its activation is kept, its weights may be meta.
        weights: The (E, 2F, D) gate-and-up weight and the (E, D, F) down weight.
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
        """Give every expert an update of rank R that is zero at first."""
        self.rank, self.alpha, self.rslora = rank, alpha, rslora
        for part in (self.gate_up_proj, self.down_proj):
            num_experts, num_out, num_in = part.shape
            device = next(part.parameters()).device
            bound = 1 / math.sqrt(num_in)
            lora_A = torch.empty(rank * num_experts, num_in)
            lora_A.uniform_(-bound, bound, generator=generator)
            part.lora_A = nn.Parameter(lora_A.to(device, dtype))
            lora_B = torch.zeros(num_out, rank * num_experts, device=device, dtype=dtype)
            part.lora_B = nn.Parameter(lora_B)
            part.scale = alpha / math.sqrt(rank) if rslora else alpha / rank

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """(T, D) with chosen experts and their weights, (T, k) each -> (T, D)."""
        out_TD = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            if expert >= self.num_experts:
                continue
            tokens, places = torch.where(top_k_index == expert)
            gate_up = self.gate_up_proj(hidden_states[tokens], expert)
            gate, up = gate_up.chunk(2, dim=-1)
            y = self.down_proj(self.act_fn(gate) * up, expert)
            y = y * top_k_weights[tokens, places, None]
            out_TD = out_TD.index_add(0, tokens, y.to(out_TD.dtype))
        return out_TD

    def adapter_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Factors with PEFT's keys: its wrappers nest, the first parameter outermost."""
        if not self.has_lora:
            return
        for prefix, part in (("base_layer.", self.gate_up_proj), ("", self.down_proj)):
            assert part.lora_A is not None and part.lora_B is not None
            yield f"{prefix}lora_A.weight", part.lora_A
            yield f"{prefix}lora_B.weight", part.lora_B

    def target_parameters(self, name: str) -> list[str]:
        """What adapter_config.json lists."""
        return [f"{name}.{part}" for part in PARTS]


class _ExpertProduct(torch.autograd.Function):
    """y = x W_e^T for a frozen expert; saves nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: ExpertWeight, expert: int) -> Tensor:
        ctx.weight, ctx.expert = weight, expert
        return F.linear(x, weight.dense(expert, x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        return grads[0] @ ctx.weight.dense(ctx.expert, grads[0].dtype), None, None

