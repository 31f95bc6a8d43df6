"""How far two models agree on held-out text, with one of them in memory at a time.

The last hidden states of one are kept; the logits of both are made again from them, some tokens at
a time. Only positions that predict a target count.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nibble.data.loader import Batch, eval_batches, next_labels
from nibble.data.packing import Row
from nibble.kernels.cross_entropy import IGNORED
from nibble.model.families import Head, head_of, hidden_states

# Enough for a loss to a thousandth; more only takes time.
MOST_TOKENS = 32_768
_BATCH_TOKENS = 4096
_CHUNK_VALUES = 1 << 23


@dataclass(frozen=True)
class Predictions:
    """The hidden states of a model at the positions that predict a target.

    Shapes:
        hidden_ND: (N, D). labels_N: (N,).
    """

    hidden_ND: Tensor
    labels_N: Tensor
    head: Head


@dataclass(frozen=True)
class Agreement:
    """Two models on the same targets; KL is that of the second from the first, in nats a token.

    KL = sum over tokens v of p_first(v) (log p_first(v) - log p_second(v))
    """

    num_target_tokens: int
    loss: float
    mean_kl: float
    max_kl: float
    top1_agreement: float


def held_out_batches(rows: Sequence[Row]) -> list[Batch]:
    """The first rows, of MOST_TOKENS tokens together or one row."""
    size, taken = 0, list[Row]()
    for row in rows:
        if taken and size + len(row) > MOST_TOKENS:
            break
        taken.append(row)
        size += len(row)
    return list(eval_batches(taken, max_tokens=_BATCH_TOKENS))


@torch.no_grad()
def predict(model: Any, batches: Iterable[Batch]) -> Predictions:
    """Run a model over held-out batches."""
    model.eval()
    head = head_of(model)
    hidden, labels = [], []
    for batch in batches:
        moved = batch.to(head.weight.device)
        next_T = next_labels(moved.labels)
        targets = (next_T != IGNORED).nonzero().flatten()
        hidden.append(hidden_states(model, moved, targets)[targets])
        labels.append(next_T[targets])
    return Predictions(torch.cat(hidden), torch.cat(labels), head)


@torch.no_grad()
def compare(first: Predictions, second: Predictions) -> Agreement:
    """The loss of the second, and how far its distributions are from those of the first."""
    size = max(1, _CHUNK_VALUES // second.head.weight.shape[0])
    loss, kl_sum, kl_max, num_same = 0.0, 0.0, 0.0, 0
    num_targets = len(second.labels_N)
    for start in range(0, num_targets, size):
        part = slice(start, start + size)
        log_p = first.head.logits(first.hidden_ND[part]).float().log_softmax(-1)
        log_q = second.head.logits(second.hidden_ND[part]).float().log_softmax(-1)
        loss += float(F.nll_loss(log_q, second.labels_N[part], reduction="sum"))
        num_same += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
        kl = (log_p.exp() * log_p.sub_(log_q)).sum(-1)
        kl_sum += float(kl.sum())
        kl_max = max(kl_max, float(kl.max()))
    return Agreement(
        num_targets, loss / num_targets, kl_sum / num_targets, kl_max, num_same / num_targets
    )
