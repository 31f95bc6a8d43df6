"""Cross-entropy of a frozen head without the full logits.

Rows without a target cost nothing. The others go through the head in chunks of 256; the softmax
of a chunk is taken in tiles of 8 rows in float32, which stay in the cache, and the gradient of
the hidden states is computed on the way, so backward only scales it.

    z = cap(logit_scale * hidden weight^T),  loss = sum over t of logsumexp(z_t) - z_t[label_t]
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

IGNORED = -100
CHUNK_ROWS = 256
TILE_ROWS = 8


def head_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """Cross-entropy summed over the rows whose label is not -100, a float32 scalar.

    Differentiable in `hidden`, and in `weight` where that requires a gradient.

    Shapes:
        hidden: (T, D). weight: (V, D). labels: (T,), the token that each row predicts.
    """
    return _HeadCrossEntropy.apply(hidden, weight, labels, softcap, logit_scale)


def head_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """`head_cross_entropy` in plain torch with full logits."""
    logits_TV = _capped((hidden @ weight.T).float() * logit_scale, softcap)
    return F.cross_entropy(logits_TV, labels, ignore_index=IGNORED, reduction="sum")


@torch.no_grad()
def head_metrics(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The summed cross-entropy, and the number of labels that are the most likely token."""
    rows = (labels != IGNORED).nonzero().flatten()
    loss_sum = hidden.new_zeros((), dtype=torch.float32)
    num_correct = hidden.new_zeros((), dtype=torch.int64)
    for chunk in rows.split(CHUNK_ROWS):
        logits_CV = _capped((hidden[chunk] @ weight.T).float() * logit_scale, softcap)
        loss_sum += F.cross_entropy(logits_CV, labels[chunk], reduction="sum")
        num_correct += (logits_CV.argmax(-1) == labels[chunk]).sum()
    return loss_sum, num_correct


class _HeadCrossEntropy(torch.autograd.Function):
    """Computes the gradients in forward, where the softmax is at hand."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        softcap: float | None,
        logit_scale: float,
    ) -> Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden_TD = torch.zeros_like(hidden) if needs_hidden else None
        grad_weight_VD = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        loss_sum = hidden.new_zeros((), dtype=torch.float32)
        rows = (labels != IGNORED).nonzero().flatten()
        buffer_CV = hidden.new_empty(min(CHUNK_ROWS, rows.numel()), weight.shape[0])
        for chunk in rows.split(CHUNK_ROWS):
            hidden_CD = hidden[chunk]
            logits_CV = torch.mm(hidden_CD, weight.T, out=buffer_CV[: chunk.numel()])
            loss_sum += _logits_to_gradient(logits_CV, labels[chunk], softcap, logit_scale)
            if grad_hidden_TD is not None:
                grad_hidden_TD[chunk] = logits_CV @ weight
            if grad_weight_VD is not None:
                grad_weight_VD += logits_CV.T @ hidden_CD
        ctx.save_for_backward(grad_hidden_TD, grad_weight_VD)
        ctx.weight_dtype = weight.dtype
        return loss_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden_TD, grad_weight_VD = ctx.saved_tensors
        if grad_hidden_TD is not None:
            grad_hidden_TD = grad_hidden_TD * grads[0].to(grad_hidden_TD.dtype)
        if grad_weight_VD is not None:
            grad_weight_VD = (grad_weight_VD * grads[0]).to(ctx.weight_dtype)
        return grad_hidden_TD, grad_weight_VD, None, None, None


def _logits_to_gradient(
    logits_CV: Tensor, labels_C: Tensor, softcap: float | None, logit_scale: float
) -> Tensor:
    """The summed loss; `logits_CV` becomes the gradient of the loss by itself, in place."""
    loss_sum = logits_CV.new_zeros((), dtype=torch.float32)
    tile_rows = TILE_ROWS if logits_CV.device.type == "cpu" else CHUNK_ROWS
    for part_CV, labels in zip(
        logits_CV.split(tile_rows), labels_C.split(tile_rows), strict=True
    ):
        tile = part_CV.float()
        if logit_scale != 1.0:
            tile = tile * logit_scale
        slope = None
        if softcap is not None:
            tanh = torch.tanh(tile / softcap)
            tile, slope = tanh * softcap, 1 - tanh * tanh
        elif tile.data_ptr() == part_CV.data_ptr():
            tile = tile.clone()
        index = labels[:, None]
        highest = tile.amax(-1, keepdim=True)
        target = tile.gather(1, index)
        tile.sub_(highest).exp_()
        total = tile.sum(-1, keepdim=True)
        loss_sum += (highest + total.log() - target).sum()
        tile.div_(total).scatter_add_(1, index, tile.new_full(index.shape, -1.0))
        if slope is not None:
            tile.mul_(slope)
        part_CV.copy_(tile.mul_(logit_scale) if logit_scale != 1.0 else tile)
    return loss_sum


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap
