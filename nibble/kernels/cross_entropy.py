"""The frozen head and its cross-entropy, without the full logits.

    logits = softcap(logit_scale * (hidden W^T + bias));  loss = sum over targets of -log p(label)

Logits exist for 256 rows at a time, and their softmax in float32 for a few rows at a time, so that
a tile stays in cache; the gradient is written over the logits and multiplied out at once, in
forward. Rows whose label is -100 cost nothing.

Labels are shifted by the caller; dividing by the number of targets is the caller's affair too.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from nibble.kernels.library import library_for
from nibble.kernels.products import product_dtype
from nibble.kernels.target import device_type

IGNORED = -100
# Rows of logits at once. Source: design measurements; 128 and 512 are 9 to 19 % slower on a CPU.
CHUNK_ROWS = 256
# Rows of float32 softmax at once on a CPU: 8 * 32000 * 4 bytes = 1 MB stays in the cache.
CPU_TILE_ROWS = 8
# Rows of the weight that are widened at once, where products want that.
SLAB_ROWS = 1024


@dataclass(frozen=True)
class _Shape:
    """What happens to a logit between the product and the softmax."""

    softcap: float | None
    logit_scale: float


def head_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    bias: Tensor | None = None,
) -> Tensor:
    """Summed cross-entropy of the head over all rows that carry a target.

    Differentiable once, with respect to `hidden` and, if they require it, `weight` and `bias`.

    Shapes:
        hidden: (T, D). weight: (V, D). labels: (T,) int64. bias: (V,). Returns a float32 scalar.

    Args:
        hidden: Last hidden states, after the final norm.
        weight: The head.
        labels: The target of each row; -100 for none.
        softcap: c in c * tanh(logit / c), Gemma 2; None leaves logits as they are.
        logit_scale: Factor of the logits, before the soft cap.
        bias: Added to the product, before the factor.
    """
    is_training = torch.is_grad_enabled()
    loss: Any = _HeadCrossEntropy.apply(
        hidden, weight, labels, bias, _Shape(softcap, logit_scale), is_training
    )
    return loss


def head_metrics(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss sum (float32 scalar) and number of targets that have the largest logit (int64 scalar).

    Same arguments as `head_cross_entropy`; without gradient.
    """
    with torch.no_grad():
        return _metrics(hidden, weight, labels, bias, _Shape(softcap, logit_scale))


def head_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    bias: Tensor | None = None,
) -> Tensor:
    """`head_cross_entropy` with full logits, for tests."""
    logits_TV = F.linear(hidden, weight, bias) * logit_scale
    logits_TV = logits_TV.float() if logits_TV.dtype != torch.float64 else logits_TV
    if softcap is not None:
        logits_TV = softcap * torch.tanh(logits_TV / softcap)
    return F.cross_entropy(logits_TV, labels, ignore_index=IGNORED, reduction="sum")


class _HeadCrossEntropy(torch.autograd.Function):
    """The loss; its gradients are made in forward, where the logits are."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        shape: _Shape,
        is_training: bool,
    ) -> Tensor:
        wants = [is_training and wanted for wanted in ctx.needs_input_grad]
        if not any(wants):
            return _metrics(hidden, weight, labels, bias, shape)[0]
        grad_hidden = torch.zeros_like(hidden) if wants[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants[1] else None
        grad_bias = torch.zeros_like(weight[:, 0], dtype=torch.float32) if wants[3] else None
        loss = torch.zeros((), device=hidden.device)
        buffer = hidden.new_empty(CHUNK_ROWS, weight.shape[0])
        for rows in (labels != IGNORED).nonzero().flatten().split(CHUNK_ROWS):
            hidden_CD = hidden[rows]
            logits_CV = _logits(hidden_CD, weight, bias, buffer)
            loss += _loss_and_gradient_(logits_CV, labels[rows], shape)
            if grad_hidden is not None:
                grad_hidden[rows] = _times_weight(logits_CV, weight)
            if grad_weight is not None:
                _add_product_(grad_weight, logits_CV, hidden_CD)
            if grad_bias is not None:
                grad_bias += logits_CV.sum(0, dtype=torch.float32)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        (grad_loss,) = grads
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        dtype = ctx.weight_dtype
        return (
            None if grad_hidden is None else grad_hidden * grad_loss,
            None if grad_weight is None else (grad_weight * grad_loss).to(dtype),
            None,
            None if grad_bias is None else (grad_bias * grad_loss).to(dtype),
            None,
            None,
        )


def _logits(hidden_CD: Tensor, weight: Tensor, bias: Tensor | None, buffer: Tensor) -> Tensor:
    """The raw product in the first rows of `buffer`."""
    logits_CV, dtype = buffer[: len(hidden_CD)], product_dtype(hidden_CD)
    if dtype == hidden_CD.dtype:
        torch.mm(hidden_CD, weight.t(), out=logits_CV)
    else:
        wide_CD = hidden_CD.to(dtype)
        for logits_CS, weight_SD in _slabs(logits_CV, weight):
            logits_CS.copy_(wide_CD @ weight_SD.to(dtype).t())
    return logits_CV if bias is None else logits_CV.add_(bias)


def _times_weight(grad_CV: Tensor, weight: Tensor) -> Tensor:
    dtype = product_dtype(grad_CV)
    if dtype == grad_CV.dtype:
        return grad_CV @ weight
    product_CD = grad_CV.new_zeros((len(grad_CV), weight.shape[1]), dtype=dtype)
    for grad_CS, weight_SD in _slabs(grad_CV, weight):
        product_CD.addmm_(grad_CS.to(dtype), weight_SD.to(dtype))
    return product_CD.to(grad_CV.dtype)


def _slabs(rows_CV: Tensor, weight: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some columns of the rows, and the rows of the weight that belong to them."""
    return zip(rows_CV.split(SLAB_ROWS, 1), weight.split(SLAB_ROWS), strict=True)


def _add_product_(total_VD: Tensor, grad_CV: Tensor, hidden_CD: Tensor) -> None:
    """total += grad^T hidden, summed in float32 over the chunks."""
    if total_VD.dtype == grad_CV.dtype:
        total_VD.addmm_(grad_CV.t(), hidden_CD)
    else:
        total_VD += grad_CV.t() @ hidden_CD


def _tiles(logits_CV: Tensor, labels_C: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Rows of logits and their labels (n, 1), few enough at a time to stay in a CPU's cache."""
    size = CPU_TILE_ROWS if device_type(logits_CV) == "cpu" else CHUNK_ROWS
    return list(zip(logits_CV.split(size), labels_C[:, None].split(size), strict=True))


def _shaped(raw: Tensor, shape: _Shape) -> Tensor:
    """Raw product -> logits, in float32 and in new memory."""
    logits = raw.to(torch.float32, copy=True)
    if shape.logit_scale != 1.0:
        logits.mul_(shape.logit_scale)
    if shape.softcap is not None:
        logits.div_(shape.softcap).tanh_().mul_(shape.softcap)
    return logits


def _loss_and_gradient_(logits_CV: Tensor, labels_C: Tensor, shape: _Shape) -> Tensor:
    """The summed loss; `logits_CV` then holds its gradient with respect to the raw product."""
    library = library_for(logits_CV)
    if library is not None:
        return library.head_(logits_CV, labels_C, shape.logit_scale, shape.softcap)
    loss = torch.zeros((), device=logits_CV.device)
    for raw, label in _tiles(logits_CV, labels_C):
        logits = _shaped(raw, shape)
        # d(c * tanh(z / c)) / dz = 1 - (capped / c)^2
        slope = None if shape.softcap is None else 1 - (logits / shape.softcap).square_()
        highest, target = logits.amax(-1, keepdim=True), logits.gather(1, label)
        probability = logits.sub_(highest).exp_()
        total = probability.sum(-1, keepdim=True)
        loss += (highest + total.log() - target).sum()
        gradient = probability.mul_(total.reciprocal_())
        gradient.scatter_add_(1, label, torch.full_like(target, -1.0))
        if slope is not None:
            gradient.mul_(slope)
        if shape.logit_scale != 1.0:
            gradient.mul_(shape.logit_scale)
        raw.copy_(gradient)
    return loss


def _metrics(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, shape: _Shape
) -> tuple[Tensor, Tensor]:
    loss = torch.zeros((), device=hidden.device)
    num_correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
    buffer = hidden.new_empty(CHUNK_ROWS, weight.shape[0])
    for rows in (labels != IGNORED).nonzero().flatten().split(CHUNK_ROWS):
        logits_CV = _logits(hidden[rows], weight, bias, buffer)
        for raw, label in _tiles(logits_CV, labels[rows]):
            logits = _shaped(raw, shape)
            num_correct += (logits.argmax(-1, keepdim=True) == label).sum()
            loss += F.cross_entropy(logits, label[:, 0], reduction="sum")
    return loss, num_correct
