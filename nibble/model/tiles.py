"""A part of a layer that works on some tokens at a time, for the least memory.

    forward     tile by tile; the input alone is kept
    backward    tile by tile: computed again, and its gradient taken at once

A feed-forward part then holds its 4F values for the tokens of one tile instead of for all. The
input is kept before anything is computed: where the layer around it is recomputed too, torch stops
there, and nothing is computed a third time.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import get_device_states, set_device_states

from nibble.kernels.layers import recipe_of

TILE_TOKENS = 512


def use_tiles(part: nn.Module) -> None:
    """Let a part whose output at a token depends on that token alone go by tiles, in place."""
    forward = part.forward

    def tiled(x: Tensor) -> Any:
        if not torch.is_grad_enabled():
            return _computed(forward, x)
        trained = [p for p in part.parameters() if p.requires_grad]
        held = _Hold.apply(forward, x, *trained)
        return _Compute.apply(forward, held)

    part.forward = tiled


def _computed(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The output, written tile by tile."""
    y = torch.empty_like(x)
    for x_tile, y_tile in zip(_tiles(x), _tiles(y), strict=True):
        y_tile.copy_(forward(x_tile))
    return y


def _tiles(x: Tensor) -> tuple[Tensor, ...]:
    return x.split(TILE_TOKENS, dim=-2)


class _Hold(torch.autograd.Function):
    """Passes x on; its backward pass is that of the whole part, from the gradient of the output.

    The trained parameters are inputs so that the output needs a gradient where they do.
    """

    @staticmethod
    def forward(ctx: Any, forward: Callable[[Tensor], Tensor], x: Tensor, *trained: Tensor) -> Any:
        recipe = recipe_of(x)
        ctx.maker, kept = None, (x,)
        if recipe is not None:
            ctx.maker, kept = recipe.maker, recipe.tensors
            ctx.maker.num_uses += 1
        ctx.save_for_backward(*kept)
        ctx.part, ctx.surroundings = forward, _Surroundings(x)
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        kept = ctx.saved_tensors
        x = kept[0] if ctx.maker is None else ctx.maker.take(*kept)
        grad_x = torch.empty_like(x)
        with ctx.surroundings.restored():
            for x_tile, grad_x_tile, grad_y_tile in zip(
                _tiles(x), _tiles(grad_x), _tiles(grads[0]), strict=True
            ):
                x_leaf = x_tile.detach().requires_grad_()
                torch.autograd.backward(ctx.part(x_leaf), grad_y_tile)
                assert x_leaf.grad is not None
                grad_x_tile.copy_(x_leaf.grad)
        return None, grad_x, *[None] * (len(ctx.needs_input_grad) - 2)


class _Compute(torch.autograd.Function):
    """The output; its gradient goes to `_Hold` as it is."""

    @staticmethod
    def forward(ctx: Any, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return _computed(forward, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, grads[0]


class _Surroundings:
    """What a result depends on beside its inputs: random state and the type of products."""

    def __init__(self, x: Tensor) -> None:
        self._random = torch.get_rng_state()
        self._devices, self._device_random = get_device_states(x)
        self._type = x.device.type
        self._is_cast = torch.is_autocast_enabled(self._type)
        self._cast = torch.get_autocast_dtype(self._type)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Within the block all is as it was, and gradients are recorded."""
        cast = torch.autocast(self._type, self._cast, enabled=self._is_cast, cache_enabled=False)
        with torch.random.fork_rng(self._devices), cast, torch.enable_grad():
            torch.set_rng_state(self._random)
            set_device_states(self._devices, self._device_random, device_type=self._type)
            yield
