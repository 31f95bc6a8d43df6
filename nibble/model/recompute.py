"""Which activations a layer keeps for the backward pass, and which it computes again.

none        everything is kept
selective   the feed-forward part of each layer is computed again (2F of 4D + 2KV + 2F values)
full        each layer keeps its input alone and is computed again
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from nibble.errors import UsageError
from nibble.model.families import decoder_layers

POLICIES = ("none", "selective", "full")


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
    for layer in decoder_layers(model):
        part = getattr(layer, "mlp", None) if policy == "selective" else layer
        if not isinstance(part, nn.Module):
            raise UsageError(
                f"recompute: {type(layer).__name__} has no feed-forward part named mlp",
                fix="use train.recompute=full or none",
            )
        part.forward = partial(_checkpointed, part.forward)


def _checkpointed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
