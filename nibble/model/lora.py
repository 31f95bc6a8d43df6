"""LoRALinear: any frozen linear layer plus a trainable update of low rank.

Knows nothing of layer names, of files, or of how the base stores its weight.

      x ──┬──────────── base ────────────┬── + ── y
          └── dropout ── A^T ── B^T · s ─┘
"""

import math
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from nibble.kernels.adapted import adapted_gradients, adapted_product
from nibble.kernels.few_rows import add_update_, is_few
from nibble.kernels.layers import recipe_of
from nibble.kernels.products import product_dtype
from nibble.model.linear4bit import weight_for_product


class FrozenLinear(Protocol):
    """What LoRALinear needs of its base."""

    in_features: int
    out_features: int
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        ...

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """(O, I), valid until the next call."""
        ...


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trainable update of rank R.

        y = base(x) + scale * dropout(x) A^T B^T,   scale = alpha / rank

    A is drawn from U(-1/sqrt(I), 1/sqrt(I)) and B is zero, so a new layer computes exactly what
    its base computes. Products run in `product_dtype` of x; the factors keep their own type.

    Shapes:
        x: (..., I) -> y: (..., O), with I = in_features and O = out_features.
        lora_A: (R, I). lora_B: (O, R). Both in float32 unless converted.

    Args:
        base: The frozen layer; its storage (bf16, NF4) is its own affair.
        rank: R, at least 1. Trainable values: R * (I + O).
        alpha: Numerator of the scale.
        dropout: Probability of zeroing an input of A, in [0, 1).
        rslora: Scale by alpha / sqrt(rank) instead.
        generator: Source of the draw of A; None is torch's global one.

    Raises:
        ValueError: If `rank` is below 1 or `dropout` is outside [0, 1).

    Source:
        Hu et al. 2021, arXiv:2106.09685, section 4.1; the draw of A as in the authors' loralib
        0.1.2 (the paper says Gaussian). rsLoRA: Kalajdzievski 2023, arXiv:2312.03732, section 3.
    """

    def __init__(
        self,
        base: Any,
        *,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        rslora: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.base = base
        self.alpha, self.dropout, self.rslora = alpha, dropout, rslora
        self.scale = lora_scale(rank=rank, alpha=alpha, dropout=dropout, rslora=rslora)
        device = next(iter(base.parameters())).device
        bound = 1 / math.sqrt(base.in_features)
        lora_A = torch.empty(rank, base.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(lora_A.to(device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        if is_few(x) and not (self.training and self.dropout):
            y = self.base(x)
            add_update_(y, x, self.lora_A, self.lora_B.T, self.scale)
            return y
        x_dropped = F.dropout(x, self.dropout) if self.training and self.dropout else None
        return _AdaptedProduct.apply(x, x_dropped, self.lora_A, self.lora_B, self.base, self.scale)

    def delta_weight(self) -> Tensor:
        """The update scale * B A as one (O, I) float32 matrix."""
        return (self.lora_B.float() * self.scale) @ self.lora_A.float()

    def extra_repr(self) -> str:
        return f"rank={self.lora_A.shape[0]}, scale={self.scale:g}, dropout={self.dropout:g}"


def lora_scale(*, rank: int, alpha: float, dropout: float, rslora: bool) -> float:
    """The factor of the update, after its arguments are checked."""
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    return alpha / math.sqrt(rank) if rslora else alpha / rank


class _AdaptedProduct(torch.autograd.Function):
    """y = x W^T + b + scale x_dropped A^T B^T with one node in the graph.

    Keeps the input of A, or what it is made again from, and its product with A^T; the frozen
    weight is asked for again in backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        x_dropped: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        base: FrozenLinear,
        scale: float,
    ) -> Tensor:
        dropped_TI = None if x_dropped is None else x_dropped.reshape(-1, x.shape[-1])
        recipe = recipe_of(x) if x_dropped is None else None
        weight = weight_for_product(base, x)
        bias = None if base.bias is None else base.bias.to(weight.dtype)
        factors = lora_A.to(weight.dtype), lora_B.to(weight.dtype)
        y, xa_TR = adapted_product(x, dropped_TI, weight, bias, *factors, scale)
        ctx.base, ctx.scale, ctx.has_dropout = base, scale, x_dropped is not None
        ctx.shape, ctx.maker = x.shape, None
        kept = (x if x_dropped is None else x_dropped,)
        if recipe is not None:
            ctx.maker, kept = recipe.maker, recipe.tensors
            ctx.maker.num_uses += 1
        ctx.save_for_backward(xa_TR, lora_A, lora_B, *kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        xa_TR, lora_A, lora_B, *kept = ctx.saved_tensors
        made = kept[0] if ctx.maker is None else ctx.maker.take(*kept)
        (grad_y,) = grads
        dtype, num_rows = product_dtype(grad_y), len(xa_TR)
        A, B = lora_A.to(dtype), lora_B.to(dtype)
        grad_x, grad_A, grad_B, grad_xa_TR = adapted_gradients(
            grad_y.reshape(num_rows, -1),
            made.reshape(num_rows, -1),
            xa_TR,
            weight_for_product(ctx.base, grad_y) if ctx.needs_input_grad[0] else None,
            None if ctx.has_dropout else A,
            B,
            ctx.scale,
        )
        grad_x = None if grad_x is None else grad_x.view(ctx.shape)
        grad_x_dropped = None
        if ctx.has_dropout and ctx.needs_input_grad[1]:
            grad_x_dropped = (grad_xa_TR @ A).to(grad_y.dtype).view(ctx.shape)
        grad_A, grad_B = grad_A.to(lora_A.dtype), grad_B.to(lora_B.dtype)
        return grad_x, grad_x_dropped, grad_A, grad_B, None, None
