"""One optimizer step over its micro-batches."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from nibble.data.loader import Batch
from nibble.errors import NonFiniteError
from nibble.train.distributed import ALONE, Ranks
from nibble.train.memory import is_out_of_memory
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
    ranks: Ranks = ALONE,
) -> StepResult:
    """Accumulate gradients over the micro-batches, clip, and move the parameters once.

        loss = sum over all target tokens of the step / their number

    The number is counted before the first backward pass, so the gradient is that of one big
    batch however the rows are split: into passes, or over ranks, whose gradients are added up.

    Args:
        micro_batches: Those of this rank; none where the step has fewer rows than ranks. One of
            no row, by its `row_ids`, counts nothing.
        on_phase: Told when "forward", "backward" and "optimizer" begin.

    Raises:
        NonFiniteError: If the loss or a gradient is NaN or infinite on any rank; nothing has moved.
        MemoryError: If another rank ran out of memory in its passes.
    """
    own = sum(batch.num_target_tokens for batch in micro_batches)
    num_target_tokens = int(ranks.sums([own])[0])
    optimizer.zero_grad()
    with memory_agreed(ranks):
        own_loss, broken = _accumulate(token_loss, micro_batches, num_target_tokens, on_phase)
    own_tokens = sum(batch.input_ids.numel() for batch in micro_batches if batch.row_ids)
    total, tokens = ranks.sums([own_loss, own_tokens])
    if not math.isfinite(total):
        raise _not_finite("loss", total, broken, ranks)
    on_phase("optimizer")
    ranks.add_up(optimizer.gradients())
    grad_norm = float(optimizer.grad_norm())
    if not math.isfinite(grad_norm):
        raise _not_finite("gradient norm", grad_norm, micro_batches, ranks)
    if grad_norm > max_grad_norm:
        optimizer.scale_grad(max_grad_norm / grad_norm)
    optimizer.step(lr)
    return StepResult(total, grad_norm, num_target_tokens, int(tokens))


def _accumulate(
    token_loss: TokenLoss,
    micro_batches: Sequence[Batch],
    num_target_tokens: int,
    on_phase: Callable[[str], None],
) -> tuple[float, list[Batch]]:
    """The part of the mean loss that these passes are, and the first whose loss is no number."""
    total, broken = 0.0, list[Batch]()
    for batch in micro_batches:
        on_phase("forward")
        loss_sum, _ = token_loss(batch)
        loss = loss_sum / max(1, num_target_tokens) if batch.row_ids else loss_sum * 0.0
        on_phase("backward")
        loss.backward()
        total += float(loss.detach())
        if not (math.isfinite(total) or broken):
            broken = [batch]
    return total, broken


@contextmanager
def memory_agreed(ranks: Ranks) -> Iterator[None]:
    """Where the memory of one rank runs out within the block, every rank ends it with an error.

    Where each needs the others within the block, they cannot: the run ends.

    Raises:
        MemoryError: On the others.
    """
    if ranks.is_alone or ranks.has_shards:
        yield
        return
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            ranks.any(True)
        raise
    if ranks.any(False):
        raise MemoryError("the memory of another rank ran out")


def _not_finite(what: str, value: float, batches: Sequence[Batch], ranks: Ranks) -> NonFiniteError:
    """The error that every rank ends with; the same text on each."""
    own = [row for batch in batches for row in batch.row_ids]
    rows = [row for ids in ranks.of_all(own) for row in ids]
    ranks.end_together()
    return NonFiniteError(
        f"the {what} is {value} at rows {rows}; the optimizer did not move",
        fix="lower optim.lr, look at these rows with `nibble data check`, or use "
        "model.dtype=float32",
    )
