"""Norms and gated units that keep no more for the backward pass than their inputs.

autograd keeps each intermediate of an expression: four tensors of a norm, three of a gated unit.
Here a norm keeps x and one number a row, a gated unit its two inputs. What they give is cheap to
compute again: `recipe_of` says how, so that a product which needs its input in the backward pass
does not have to keep it either.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from nibble.kernels.library import Library, library_for

aten: Any = torch.ops.aten
ACTIVATIONS = ("silu", "gelu_tanh")


@dataclass(eq=False)
class Maker:
    """Computes a tensor again from what its consumers kept of the recipe's tensors.

    Consumers that count themselves with `num_uses` share one computation in the backward pass. It
    holds no tensor before: a node of a recomputed layer must keep nothing alive.
    """

    make: Callable[..., Tensor]
    num_uses: int = 0
    _made: Tensor | None = None

    def take(self, *tensors: Tensor) -> Tensor:
        """The tensor; the last of the consumers lets it go."""
        made = self._made
        if made is None:
            with torch.no_grad():
                made = self.make(*tensors)
        self.num_uses -= 1
        self._made = made if self.num_uses > 0 else None
        return made


@dataclass(frozen=True)
class Recipe:
    """How to compute a tensor again from others that are kept anyway."""

    maker: Maker
    tensors: tuple[Tensor, ...]


def recipe_of(x: Tensor) -> Recipe | None:
    """How to make this very tensor again, where that is cheap."""
    return getattr(x, "nibble_recipe", None)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, unit_offset: bool) -> Tensor:
    """x / sqrt(mean(x^2) + eps), scaled; in float32, rounded to the type of x.

    Differentiable once, with respect to x alone.

    Shapes:
        x: (..., D). weight: (D,).

    Args:
        unit_offset: Scale by 1 + weight before rounding (Gemma) instead of by weight after it.

    Source:
        Zhang and Sennrich 2019, arXiv:1910.07467, equation 4.
    """
    library = None if torch.is_grad_enabled() else library_for(x, weight)
    if library is not None:
        return library.norm(x, weight, eps, unit_offset)[0]
    y: Any
    y, rstd = _RMSNorm.apply(x, weight, eps, unit_offset)  # pyright: ignore[reportGeneralTypeIssues]
    make = partial(_scaled, unit_offset=unit_offset)
    return _with_recipe(y, Recipe(Maker(make), (x, weight, rstd)))


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) * up, the two rounded one after the other.

    Shapes:
        gate, up: (..., F) -> (..., F).

    Args:
        activation: One of `ACTIVATIONS`.

    Source:
        Shazeer 2020, arXiv:2002.05202, equation 6.
    """
    if not torch.is_grad_enabled():
        return _product(gate, up, activation)
    y: Any = _Gated.apply(gate, up, activation)
    make = partial(_product, activation=activation)
    return _with_recipe(y, Recipe(Maker(make), (gate, up)))


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, *, unit_offset: bool) -> Tensor:
    """The same by autograd."""
    wide = x.float()
    rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if unit_offset:
        return (wide * rstd * (1.0 + weight.float())).type_as(x)
    return weight * (wide * rstd).to(x.dtype)


def gated_reference(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """The same by autograd."""
    return _activated(gate, activation) * up


def _with_recipe(y: Tensor, recipe: Recipe) -> Tensor:
    if y.requires_grad:
        y.nibble_recipe = recipe  # type: ignore[attr-defined]
    return y


class _RMSNorm(torch.autograd.Function):
    """Keeps x and 1 / rms(x)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, unit_offset: bool
    ) -> tuple[Tensor, Tensor]:
        library = library_for(x, weight)
        if library is not None:
            y, rstd = library.norm(x, weight, eps, unit_offset)
        else:
            rstd = torch.rsqrt(_wide(x).pow_(2).mean(-1, keepdim=True).add_(eps))
            y = _scaled(x, weight, rstd, unit_offset)
        ctx.save_for_backward(x, weight, rstd)
        ctx.unit_offset = unit_offset
        ctx.mark_non_differentiable(rstd)
        return y, rstd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """grad_x = rstd (s - n mean(s n)) with s = grad_y * scale and n = x * rstd."""
        x, weight, rstd = ctx.saved_tensors
        library = library_for(x, weight, grads[0])
        if library is not None:
            grad_x = library.norm_gradient(x, weight, rstd, grads[0], ctx.unit_offset)
            return grad_x, None, None, None
        if ctx.unit_offset:
            scaled = grads[0].float() * (1.0 + weight.float())
        else:
            scaled = _wide(grads[0] * weight)
        normed = _wide(x).mul_(rstd)
        along = (scaled * normed).mean(-1, keepdim=True)
        grad_x = scaled.sub_(normed.mul_(along)).mul_(rstd)
        return grad_x.to(x.dtype), None, None, None


class _Gated(torch.autograd.Function):
    """Keeps both inputs."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return _product(gate, up, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gate, up = ctx.saved_tensors
        (grad_y,) = grads
        library = _gated_library(gate, up, grad_y)
        if library is not None:
            return *library.gated_gradient(gate, up, grad_y, ctx.activation), None
        grad_activated = grad_y * up
        if ctx.activation == "silu":
            grad_gate = aten.silu_backward(grad_activated, gate)
        else:
            grad_gate = aten.gelu_backward(grad_activated, gate, approximate="tanh")
        return grad_gate, _activated(gate, ctx.activation).mul_(grad_y), None


def _wide(x: Tensor) -> Tensor:
    """A copy in float32."""
    return x.to(torch.float32, copy=True)


def _activated(gate: Tensor, activation: str) -> Tensor:
    return F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")


def _scaled(x: Tensor, weight: Tensor, rstd: Tensor, unit_offset: bool) -> Tensor:
    library = library_for(x, weight)
    if library is not None:
        return library.norm_again(x, weight, rstd, unit_offset)
    normed = _wide(x).mul_(rstd)
    if unit_offset:
        return normed.mul_(1.0 + weight.float()).to(x.dtype)
    return normed.to(x.dtype) * weight


def _product(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    library = _gated_library(gate, up)
    if library is not None:
        return library.gated(gate, up, activation)
    return _activated(gate, activation).mul_(up)


def _gated_library(gate: Tensor, up: Tensor, *others: Tensor) -> Library | None:
    """The fast code for inputs whose rows lie alike."""
    return library_for(gate, up, *others) if gate.stride() == up.stride() else None
