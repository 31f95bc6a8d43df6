"""The rows that a plan is made for: the user's own, or full ones where there is no data yet."""

import math
from dataclasses import dataclass, replace

from nibble.config import RunConfig
from nibble.data.dataset import Dataset
from nibble.data.loader import Loader, eval_batches
from nibble.train.evaluate import EVAL_TOKENS

Documents = tuple[int, ...]


@dataclass(frozen=True)
class Rows:
    """Document lengths of training rows and of the largest evaluation batch.

    Args:
        worst: By rows per forward pass: the documents of the largest pass of the whole run.
        eval_documents: Those of the largest evaluation batch; empty without held-out data.
        num_rows: Rows of an epoch; the last step of one has what is left.
        num_steps: Optimizer steps of the run; None where they are not known.
        mean_row_tokens: Tokens of a row on average.
        target_share: Share of tokens that carry loss.
    """

    worst: dict[int, Documents]
    eval_documents: Documents
    num_rows: int
    num_steps: int | None
    mean_row_tokens: float
    target_share: float = 1.0

    def passes_per_step(self, batch_size: int, size: int) -> float:
        """Forward passes of `size` rows that an optimizer step takes on average."""
        num_full, num_left = divmod(self.num_rows, batch_size)
        num_passes = num_full * -(-batch_size // size) + -(-num_left // size)
        return num_passes / math.ceil(self.num_rows / batch_size)

    def rows_per_step(self, batch_size: int) -> float:
        """Rows of an optimizer step on average."""
        return self.num_rows / math.ceil(self.num_rows / batch_size)

    def cut(self, length: int) -> "Rows":
        """The same with at most `length` tokens a row."""
        return replace(
            self,
            worst={size: _cut(lengths, length, size) for size, lengths in self.worst.items()},
            mean_row_tokens=min(self.mean_row_tokens, length),
        )


def full_rows(run: RunConfig) -> Rows:
    """Rows of one document of `data.max_seq_len` tokens each."""
    length, batch_size = run.data.max_seq_len, run.train.batch_size
    num_eval = max(1, EVAL_TOKENS // length) if run.data.eval else 0
    return Rows(
        worst={size: (length,) * min(size, batch_size) for size in _sizes(run, batch_size)},
        eval_documents=(length,) * num_eval,
        num_rows=batch_size,
        num_steps=run.train.steps,
        mean_row_tokens=length,
    )


def rows_of(dataset: Dataset, run: RunConfig) -> Rows:
    """The rows of a data set, in the order in which the run will see them."""
    loader = Loader(
        dataset.train,
        batch_size=run.train.batch_size,
        micro_batch_size=1,
        seed=run.train.seed,
    )
    num_steps = run.train.steps or loader.steps(run.train.epochs)
    held_out = [
        tuple(length for row_id in batch.row_ids for length in dataset.eval[row_id].doc_lens)
        for batch in eval_batches(dataset.eval, max_tokens=EVAL_TOKENS)
    ]
    tokens = sum(len(row) for row in dataset.train)
    return Rows(
        worst={size: _worst(loader, num_steps, size) for size in _sizes(run, len(dataset.train))},
        eval_documents=max(held_out, key=sum, default=()),
        num_rows=len(dataset.train),
        num_steps=num_steps,
        mean_row_tokens=tokens / len(dataset.train),
        target_share=sum(row.num_target_tokens for row in dataset.train) / tokens,
    )


def _worst(loader: Loader, num_steps: int, size: int) -> Documents:
    ids = loader.largest_pass(num_steps, size)
    return tuple(length for i in ids for length in loader.rows[i].doc_lens)


def _cut(documents: Documents, length: int, num_rows: int) -> Documents:
    """As many of the documents, at most `length` tokens of each, as so many rows hold."""
    kept: list[int] = []
    for document in documents:
        kept.append(min(document, length, num_rows * length - sum(kept)))
    return tuple(size for size in kept if size > 0)


def _sizes(run: RunConfig, num_rows: int) -> list[int]:
    """Rows per forward pass to know: 1 and what is set, or powers of two up to a step's rows."""
    if run.train.micro_batch_size != "auto":
        return sorted({1, int(run.train.micro_batch_size)})
    most = min(num_rows, run.train.batch_size)
    return [2**power for power in range(most.bit_length())]
