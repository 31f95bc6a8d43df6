"""Held-out loss, perplexity and token accuracy, weighted by tokens."""

import math
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

import torch
from torch import nn

from nibble.data.loader import Batch
from nibble.errors import NonFiniteError
from nibble.events import EvalEnd
from nibble.train.distributed import ALONE, Ranks
from nibble.train.loss import token_metrics

Item = TypeVar("Item")
# Tokens of a batch of held-out rows; one row where that is longer.
EVAL_TOKENS = 4096


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    step: int = 0,
    autocast: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    ranks: Ranks = ALONE,
) -> EvalEnd:
    """The mean loss over all target tokens, in nats, and the share predicted exactly.

    Args:
        batches: All of them, on every rank; each computes its share.

    Raises:
        NonFiniteError: If a loss is NaN or infinite.
    """
    start = time.monotonic()
    was_training = model.training
    model.eval()
    loss_sum, num_correct, num_target_tokens = 0.0, 0, 0
    try:
        for batch, counts, row_ids in _shares(batches, ranks):
            found = token_metrics(model, batch.to(device), autocast=autocast)
            sums = ranks.sums(found if counts else (0, 0, 0))
            if not math.isfinite(sums[0]):
                ranks.end_together()
                raise NonFiniteError(
                    f"the held-out loss is {sums[0]} at rows {row_ids}",
                    fix="look at these rows with `nibble data check`, lower optim.lr, or use "
                    "model.dtype=float32",
                )
            loss_sum += sums[0]
            num_correct += int(sums[1])
            num_target_tokens += int(sums[2])
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


def _shares(batches: Iterable[Batch], ranks: Ranks) -> Iterator[tuple[Batch, bool, list[int]]]:
    """This rank's batch of every round, whether it counts, and the rows of the round.

    A round is a batch a rank. In one with fewer, the last ranks repeat a batch and count nothing:
    all have the same number of passes.
    """
    for batch_round in _batched(batches, ranks.world_size):
        place = min(ranks.rank, len(batch_round) - 1)
        row_ids = [row for batch in batch_round for row in batch.row_ids]
        yield batch_round[place], place == ranks.rank, row_ids


def _batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` items, the last one shorter."""
    several = iter(items)
    while found := list(islice(several, size)):
        yield found
