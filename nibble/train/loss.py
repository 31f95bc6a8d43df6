"""Summed cross-entropy of a batch and the number of its target tokens."""

import torch
from torch import Tensor, nn

from nibble.data.loader import Batch, next_labels
from nibble.kernels.cross_entropy import IGNORED, head_cross_entropy, head_metrics
from nibble.model.families import head_of, hidden_states
from nibble.model.sharding import within


def token_loss(
    model: nn.Module, batch: Batch, *, autocast: torch.dtype | None = None
) -> tuple[Tensor, int]:
    """Cross-entropy summed over the target tokens, and how many there are.

        loss_sum = - sum over t with labels[t + 1] >= 0 of log p(labels[t + 1] | tokens <= t)

    Whole logits never exist.

    Args:
        autocast: Type of the products when the weights are wider (full fine-tuning keeps them in
            float32); None multiplies in the type of the weights.

    Returns:
        A float32 scalar to call backward on, and `batch.num_target_tokens`.
    """
    return within(model, _summed_loss, batch, autocast), batch.num_target_tokens


@torch.no_grad()
def token_metrics(
    model: nn.Module, batch: Batch, *, autocast: torch.dtype | None = None
) -> tuple[float, int, int]:
    """Summed cross-entropy, number of targets predicted exactly, number of targets."""
    loss_sum, num_correct = within(model, _metrics, batch, autocast)
    return float(loss_sum), int(num_correct), batch.num_target_tokens


def _summed_loss(model: nn.Module, batch: Batch, autocast: torch.dtype | None) -> Tensor:
    hidden_TD, weight_VD, labels_T = _head_inputs(model, batch, autocast)
    head = head_of(model)
    return head_cross_entropy(
        hidden_TD, weight_VD, labels_T, softcap=head.softcap, logit_scale=head.logit_scale
    )


def _metrics(model: nn.Module, batch: Batch, autocast: torch.dtype | None) -> tuple[Tensor, Tensor]:
    hidden_TD, weight_VD, labels_T = _head_inputs(model, batch, autocast)
    head = head_of(model)
    return head_metrics(
        hidden_TD, weight_VD, labels_T, softcap=head.softcap, logit_scale=head.logit_scale
    )


def _head_inputs(
    model: nn.Module, batch: Batch, autocast: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    device_type, labels_T = batch.input_ids.device.type, next_labels(batch.labels)
    # Each weight is used once, so that autocast's cache would only hold a second copy of them all.
    is_wider = autocast is not None
    with torch.autocast(device_type, autocast, enabled=is_wider, cache_enabled=False):
        hidden_TD = hidden_states(model, batch, (labels_T != IGNORED).nonzero().flatten())
    dtype = autocast or hidden_TD.dtype
    return hidden_TD.to(dtype), head_of(model).weight.to(dtype), labels_T
