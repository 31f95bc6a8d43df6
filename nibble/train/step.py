"""One optimizer step over its micro-batches."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from nibble.data.loader import Batch
from nibble.errors import NonFiniteError
from nibble.train.optimizer import AdamW

TokenLoss = Callable[[Batch], tuple[Tensor, int]]


@dataclass(frozen=True)
class StepResult:
    """What one step saw: mean loss over its target tokens, and the norm before clipping."""

    loss: float
    grad_norm: float
    num_target_tokens: int
    tokens: int


def train_step(
    token_loss: TokenLoss,
    micro_batches: Sequence[Batch],
    optimizer: AdamW,
    *,
    lr: float,
    max_grad_norm: float,
    on_phase: Callable[[str], None] = lambda phase: None,
) -> StepResult:
    """Accumulate gradients over the micro-batches, clip, and move the parameters once.

        loss = sum over all target tokens of the step / their number

    The number is counted before the first backward pass, so the gradient is that of one big
    batch however the rows are split.

    Args:
        on_phase: Told when "forward", "backward" and "optimizer" begin.

    Raises:
        NonFiniteError: If the loss or a gradient is NaN or infinite; nothing has moved.
    """
    num_target_tokens = sum(batch.num_target_tokens for batch in micro_batches)
    optimizer.zero_grad()
    total = 0.0
    for batch in micro_batches:
        on_phase("forward")
        loss_sum, _ = token_loss(batch)
        loss = loss_sum / max(1, num_target_tokens)
        on_phase("backward")
        loss.backward()
        total += float(loss.detach())
        if not math.isfinite(total):
            raise _not_finite("loss", total, [batch])
    on_phase("optimizer")
    grad_norm = float(optimizer.grad_norm())
    if not math.isfinite(grad_norm):
        raise _not_finite("gradient norm", grad_norm, micro_batches)
    if grad_norm > max_grad_norm:
        optimizer.scale_grad(max_grad_norm / grad_norm)
    optimizer.step(lr)
    tokens = sum(batch.input_ids.numel() for batch in micro_batches)
    return StepResult(total, grad_norm, num_target_tokens, tokens)


def _not_finite(what: str, value: float, batches: Sequence[Batch]) -> NonFiniteError:
    rows = [row for batch in batches for row in batch.row_ids]
    return NonFiniteError(
        f"the {what} is {value} at rows {rows}; the optimizer did not move",
        fix="lower optim.lr, look at these rows with `nibble data check`, or use "
        "model.dtype=float32",
    )
