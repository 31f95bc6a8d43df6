"""A training step under the memory tracker: its phases, and what each byte is for.

The same functions watch a step on fake tensors (a plan) and on real ones (its check).
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nibble.config import RunConfig
from nibble.data.loader import Batch
from nibble.model.families import decoder_layers, decoder_of
from nibble.model.ledger import stored_tensors
from nibble.model.lora import LoRALinear
from nibble.plan.tracker import HEAD, SAVED, WORKING, MemoryTracker
from nibble.train.build import autocast_of, equip
from nibble.train.evaluate import evaluate
from nibble.train.loss import token_loss
from nibble.train.optimizer import AdamW
from nibble.train.step import train_step

BASE_4BIT = "base in 4 bits"
BASE_DENSE = "base in 16 bits"
EMBEDDINGS = "embeddings and head"
SMALL = "norms and tables"
ADAPTERS = "adapters"
TRAINED = "trained weights"
GRADIENTS = "gradients"
MOMENTS = "optimizer state"
DEQUANTISED = "dequantise buffer"

_SMALL_USES = ("norms", "biases", "routers", "tables")
_EMBEDDING_USES = ("embeddings", "head")


def watch_build(model: nn.Module, run: RunConfig, tracker: MemoryTracker) -> AdamW:
    """Adapt a loaded base and make its optimizer; label all that is resident from then on."""
    tracker.settle(WORKING)
    for kind, tensor in stored_tensors(model):
        tracker.name([tensor], _part_of(kind))
    tracker.begin("build", MOMENTS)
    optimizer = equip(model, run)
    tracker.settle(MOMENTS)
    trained = [p for group in optimizer.groups for p in group.parameters]
    tracker.name(trained, TRAINED if run.method == "full" else ADAPTERS)
    tracker.name([p.grad for p in trained if p.grad is not None], GRADIENTS)
    for kind, tensor in stored_tensors(model):
        if not tensor.requires_grad:
            tracker.name([tensor], _part_of(kind))
    return optimizer


def watch_step(
    model: nn.Module,
    optimizer: AdamW,
    run: RunConfig,
    batches: Sequence[Batch],
    tracker: MemoryTracker,
    buffers: dict[Any, Tensor],
) -> None:
    """One optimizer step."""
    autocast = autocast_of(run)

    def begin(phase: str) -> None:
        tracker.settle(HEAD if phase == "backward" else WORKING)
        tracker.begin(phase, WORKING)

    model.train()
    with _labelled_layers(model, tracker, buffers):
        train_step(
            lambda batch: token_loss(model, batch, autocast=autocast),
            batches,
            optimizer,
            lr=run.optim.lr,
            max_grad_norm=run.optim.max_grad_norm,
            on_phase=begin,
        )
    tracker.settle(WORKING)


def watch_evaluation(
    model: nn.Module,
    run: RunConfig,
    batch: Batch,
    tracker: MemoryTracker,
    buffers: dict[Any, Tensor],
) -> None:
    """Evaluation of one batch."""
    tracker.begin("eval", WORKING)
    with _labelled_layers(model, tracker, buffers):
        evaluate(model, [batch], autocast=autocast_of(run))
    tracker.settle(WORKING)


@torch.no_grad()
def watch_result(
    model: nn.Module, optimizer: AdamW, run: RunConfig, tracker: MemoryTracker
) -> None:
    """What is written at the end, and the merged weight of the largest layer in float32."""
    tracker.begin("save", WORKING)
    if run.method == "full":
        optimizer.release()
        copies = [parameter.to(torch.bfloat16) for parameter in model.parameters()]
        del copies
    layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
    if layers:
        tracker.begin("merge", WORKING)
        largest = max(layers, key=lambda layer: layer.in_features * layer.out_features)
        weight = largest.base.dense_weight(torch.float32) + largest.delta_weight()
        del weight


@contextmanager
def _labelled_layers(
    model: nn.Module, tracker: MemoryTracker, buffers: dict[Any, Tensor]
) -> Iterator[None]:
    """Within the block, what outlives its decoder layer is a saved activation."""

    def settle(*_: Any) -> None:
        if torch._C._current_graph_task_id() == -1:
            tracker.settle(SAVED)
        tracker.name(buffers.values(), DEQUANTISED)

    def begin_head(*_: Any) -> None:
        settle()
        tracker.label = HEAD

    with ExitStack() as hooks:
        for layer in decoder_layers(model):
            hooks.callback(layer.register_forward_pre_hook(settle).remove)
            hooks.callback(layer.register_forward_hook(settle).remove)
        hooks.callback(decoder_of(model).register_forward_hook(begin_head).remove)
        yield


def _part_of(kind: str) -> str:
    """The part of memory that a kind of storage belongs to; see `resident_bytes`."""
    _, use = kind.split(" ", 1)
    if use in _EMBEDDING_USES:
        return EMBEDDINGS
    if use in _SMALL_USES:
        return SMALL
    if use == "adapters":
        return ADAPTERS
    return BASE_DENSE if use in ("linears", "experts") else BASE_4BIT
