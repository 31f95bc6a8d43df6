"""Held-out loss, perplexity and token accuracy, weighted by tokens."""

import math
import time
from collections.abc import Iterable

import torch
from torch import nn

from nibble.data.loader import Batch
from nibble.errors import NonFiniteError
from nibble.events import EvalEnd
from nibble.train.loss import token_metrics

# Tokens of a batch of held-out rows; one row where that is longer.
EVAL_TOKENS = 4096


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    step: int = 0,
    autocast: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> EvalEnd:
    """The mean loss over all target tokens, in nats, and the share predicted exactly.

    Raises:
        NonFiniteError: If a loss is NaN or infinite.
    """
    start = time.monotonic()
    was_training = model.training
    model.eval()
    loss_sum, num_correct, num_target_tokens = 0.0, 0, 0
    try:
        for batch in batches:
            batch_loss, batch_correct, batch_targets = token_metrics(
                model, batch.to(device), autocast=autocast
            )
            if not math.isfinite(batch_loss):
                raise NonFiniteError(
                    f"the held-out loss is {batch_loss} at rows {list(batch.row_ids)}",
                    fix="look at these rows with `nibble data check`, lower optim.lr, or use "
                    "model.dtype=float32",
                )
            loss_sum += batch_loss
            num_correct += batch_correct
            num_target_tokens += batch_targets
    finally:
        model.train(was_training)
    loss = loss_sum / max(1, num_target_tokens)
    return EvalEnd(
        step=step,
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        token_accuracy=num_correct / max(1, num_target_tokens),
        num_target_tokens=num_target_tokens,
        seconds=time.monotonic() - start,
    )
