"""Which activations a layer keeps for the backward pass, and which it computes again.

none        everything is kept
selective   the feed-forward part of each layer is computed again (2F of 4D + 2KV + 2F values)
full        each layer keeps its input alone and is computed again
offload     as full, and the inputs wait in host memory: at most two of them are on the device
tiled       as offload, and the feed-forward part works on some tokens at a time
"""

import time
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nibble.errors import UsageError
from nibble.kernels.layers import recipe_of
from nibble.kernels.target import device_type, host_empty
from nibble.model.families import decoder_layers
from nibble.model.tiles import use_tiles

POLICIES = ("none", "selective", "full", "offload", "tiled")
NUM_ON_DEVICE = 2


def apply_recompute(model: nn.Module, policy: str) -> None:
    """Make the decoder layers of `model` follow a policy, in place.

    Raises:
        UsageError: If the policy is unknown, or the layers have no part it applies to.
    """
    if policy not in POLICIES:
        raise UsageError(
            f"train.recompute={policy} is not available, expected {', '.join(POLICIES)}",
            fix="use full, which keeps the least of them",
        )
    if policy == "none":
        return
    inputs = HostInputs()
    for layer in decoder_layers(model):
        if policy == "tiled":
            use_tiles(_feed_forward(layer))
        part = _feed_forward(layer) if policy == "selective" else layer
        if policy in ("offload", "tiled"):
            part.forward = partial(_offloaded, part.forward, inputs)
        else:
            part.forward = partial(_checkpointed, part.forward)


def _feed_forward(layer: nn.Module) -> nn.Module:
    part = getattr(layer, "mlp", None)
    if not isinstance(part, nn.Module):
        raise UsageError(
            f"recompute: {type(layer).__name__} has no feed-forward part named mlp",
            fix="use train.recompute=full or none",
        )
    return part


def _checkpointed(forward: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(x, *args, **kwargs)
    recipe = recipe_of(x)
    if recipe is None:
        return checkpoint(forward, x, *args, use_reentrant=False, **kwargs)
    # What x is made of is kept in any case. Both passes see a tensor without a recipe.
    maker, tensors = recipe.maker, recipe.tensors
    maker.num_uses += 1
    unused = [x.view_as(x)]

    def run(like_x: Tensor) -> Any:
        made = unused.pop() if unused else maker.take(*tensors).detach().requires_grad_()
        return forward(made, *args, **kwargs)

    return checkpoint(run, x.new_empty(0), use_reentrant=False)


def _offloaded(
    forward: Callable[..., Any], inputs: "HostInputs", x: Tensor, *args: Any, **kwargs: Any
) -> Any:
    if not torch.is_grad_enabled():
        return forward(x, *args, **kwargs)
    kept = inputs.keep(x)
    unused = [x]

    def run(like_x: Tensor) -> Any:
        return forward(unused.pop() if unused else inputs.take(kept), *args, **kwargs)

    # The empty tensor says on which device the random state has to be restored.
    return checkpoint(run, x.new_empty(0), use_reentrant=False)


@dataclass(eq=False)
class KeptInput:
    """The input of a layer in host memory, and for a while on the device as well."""

    host: Tensor
    on_device: Tensor | None
    device: torch.device
    needs_grad: bool
    copied: torch.cuda.Event | None
    before: "weakref.ref[KeptInput] | None"


class HostInputs:
    """The inputs of layers in host memory; copies run beside the computation.

        forward     the input of layer i goes out while i computes; that of i - 2 is let go
        backward    layer i takes its input; that of i - 1 comes back while i computes

    The last two layers find their inputs still on the device.
    """

    def __init__(self) -> None:
        self._copies: SideCopies | None = None
        self._on_device: deque[KeptInput] = deque()
        self._last: weakref.ref[KeptInput] | None = None

    def keep(self, x: Tensor) -> KeptInput:
        """Start to copy `x` to the host."""
        while len(self._on_device) >= NUM_ON_DEVICE:
            self._let_go(self._on_device[0])
        here, host = x.detach(), host_empty(*x.shape, dtype=x.dtype)
        copied = self._copies_to(x.device).copy(host, here)
        kept = KeptInput(host, here, x.device, x.requires_grad, copied, self._last)
        self._on_device.append(kept)
        self._last = weakref.ref(kept)
        return kept

    def take(self, kept: KeptInput) -> Tensor:
        """What was kept, on its device; the input kept before it starts to come back."""
        self._bring(kept)
        x = self._let_go(kept)
        before = kept.before() if kept.before else None
        if before is not None:
            self._bring(before)
        return x.requires_grad_(kept.needs_grad)

    def _bring(self, kept: KeptInput) -> None:
        if kept.on_device is None:
            kept.on_device = torch.empty(kept.host.shape, dtype=kept.host.dtype, device=kept.device)
            kept.copied = self._copies_to(kept.device).copy(kept.on_device, kept.host)
            self._on_device.append(kept)

    def _let_go(self, kept: KeptInput) -> Tensor:
        """The tensor on the device, which is free as soon as the caller drops it."""
        x = kept.on_device
        assert x is not None
        self._copies_to(kept.device).wait(kept.copied)
        self._on_device.remove(kept)
        kept.on_device = None
        return x

    def _copies_to(self, device: torch.device) -> "SideCopies":
        self._copies = self._copies or SideCopies(device)
        return self._copies


class SideCopies:
    """Copies that run beside the computation where the device can, else at once.

        done = copies.copy(slot, page)      starts when all that was asked for so far is computed
        copies.wait(done)                   what is asked for from here on sees the copy

    Copies run one after the other, in the order they were asked for.

    Args:
        device: Where one side of every copy is; the other side is of `host_empty`.
    """

    def __init__(self, device: torch.device) -> None:
        has_streams = device_type(device) == "cuda" and torch.cuda.is_available()
        self._stream = torch.cuda.Stream() if has_streams else None
        self._waits: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._stall_seconds = 0.0

    def copy(self, target: Tensor, source: Tensor) -> torch.cuda.Event | None:
        """Start a copy; the tensors must stay until it has been waited for."""
        if self._stream is None:
            start = time.perf_counter()
            target.copy_(source)
            self._stall_seconds += time.perf_counter() - start
            return None
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        return _mark(self._stream)

    def wait(self, done: torch.cuda.Event | None) -> None:
        """Let the computation, but not the caller, wait for a copy."""
        if done is None:
            return
        computation = torch.cuda.current_stream()
        start = _mark(computation)
        computation.wait_event(done)
        self._waits.append((start, _mark(computation)))
        self._count_waits()

    def synchronize(self) -> None:
        """Let the caller wait for every copy."""
        if self._stream is not None:
            self._stream.synchronize()

    @property
    def stall_seconds(self) -> float:
        """Time that the computation has stood still for copies."""
        if self._waits:
            self._waits[-1][1].synchronize()
        self._count_waits()
        return self._stall_seconds

    def _count_waits(self) -> None:
        while self._waits and self._waits[0][1].query():
            start, end = self._waits.popleft()
            self._stall_seconds += start.elapsed_time(end) / 1e3


def _mark(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """An event after everything asked of the stream so far."""
    event = torch.cuda.Event(enable_timing=True)
    event.record(stream)
    return event
