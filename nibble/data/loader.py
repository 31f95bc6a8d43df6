"""Rows to batches; which rows, and in which order, is a function of (seed, step) alone.

    epoch   permutation of all rows, drawn from (seed, epoch)
    step    the next `batch_size` rows of it; the last step of an epoch may have fewer
    rank    every `world_size`-th row of the step
    batch   `micro_batch_size` rows of those, their documents end to end without padding

So a run resumes at any step with the rows it would have had, at any world size.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from nibble.data.packing import NOT_TARGET, Row


@dataclass(frozen=True)
class Batch:
    """Documents laid end to end in one line of T tokens.

    Shapes:
        input_ids, labels, position_ids: (1, T), int64. Labels are not shifted; the first of
        each document is -100.
        cu_seq_lens: (num_docs + 1,), int32: document i is tokens cu[i] to cu[i + 1].

    `row_ids` are the numbers of the rows in the list that the loader was given.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    cu_seq_lens: Tensor
    max_doc_len: int
    num_target_tokens: int
    row_ids: tuple[int, ...]

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with its tensors on `device`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        moved = {name: value.to(device, non_blocking=True) for name, value in tensors.items()}
        return replace(self, **moved)


class Loader:
    """Batches of one rank, for any step.

    Args:
        rows: All training rows, the same on every rank.
        batch_size: Rows in an optimizer step over all ranks.
        micro_batch_size: Rows in one forward pass of one rank.
        seed: Of the order.
        rank: Of this process, from 0.
        world_size: Number of processes.
        is_even: Every rank has as many batches in a step as the one with the most; those that fill
            up are of the step's first row, and of no row by their `row_ids`.

    Raises:
        ValueError: No rows, a size below 1, or a rank outside the world.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        *,
        batch_size: int,
        micro_batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        is_even: bool = False,
    ) -> None:
        if not rows:
            raise ValueError("a loader needs at least one row")
        if min(batch_size, micro_batch_size, world_size) < 1 or not 0 <= rank < world_size:
            raise ValueError("sizes are at least 1 and 0 <= rank < world_size")
        self.rows = rows
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.is_even = is_even
        self._permutation: tuple[int, list[int]] = (-1, [])

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def steps(self, epochs: float) -> int:
        """The steps of so many epochs, a part of one rounded up to whole steps."""
        return math.ceil(epochs * self.steps_per_epoch)

    def row_ids(self, step: int) -> list[int]:
        """The rows of a step over all ranks, in order; `step` counts from 0 over all epochs."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = self._order(epoch)
        return order[place * self.batch_size : (place + 1) * self.batch_size]

    def num_target_tokens(self, step: int) -> int:
        """The target tokens of a step over all ranks: what its summed loss is divided by."""
        return sum(self.rows[i].num_target_tokens for i in self.row_ids(step))

    def micro_batches(self, step: int) -> list[Batch]:
        """This rank's batches of a step; none where the step has fewer rows than ranks."""
        batches = self._batches_of(self.rank, step)
        if not self.is_even:
            return batches
        ids = self.row_ids(step)
        most_rows = -(-len(ids) // self.world_size)
        num_missing = -(-most_rows // self.micro_batch_size) - len(batches)
        return batches + [self._blank(ids[0])] * num_missing

    def _blank(self, row: int) -> Batch:
        """A pass that counts nothing."""
        return replace(rows_to_batch([self.rows[row]], []), num_target_tokens=0)

    def all_batches(self, step: int) -> Iterator[Batch]:
        """The batches of every rank of a step, one rank after the other."""
        for rank in range(self.world_size):
            yield from self._batches_of(rank, step)

    def _batches_of(self, rank: int, step: int) -> list[Batch]:
        mine = self.row_ids(step)[rank :: self.world_size]
        size = self.micro_batch_size
        return [
            rows_to_batch([self.rows[i] for i in mine[at : at + size]], mine[at : at + size])
            for at in range(0, len(mine), size)
        ]

    def largest_pass(self, num_steps: int, size: int) -> list[int]:
        """The rows of the pass of `size` rows with the most tokens in the first steps of a run.

        It may be that of any rank: each gets the same answer.
        """
        lengths = np.array([len(row) for row in self.rows])
        largest: list[int] = []
        for step in range(num_steps):
            ids = self.row_ids(step)
            shares = [ids[rank :: self.world_size] for rank in range(self.world_size)]
            parts = [mine[at : at + size] for mine in shares for at in range(0, len(mine), size)]
            largest = max([largest, *parts], key=lambda part: lengths[part].sum() if part else 0)
        return largest

    def _order(self, epoch: int) -> list[int]:
        if self._permutation[0] != epoch:
            # RandomState is numpy's frozen generator: its draws never change between versions.
            words = [self.seed & 0xFFFFFFFF, (self.seed >> 32) & 0xFFFFFFFF, epoch]
            generator = np.random.RandomState(np.array(words, dtype=np.uint32))
            self._permutation = epoch, generator.permutation(len(self.rows)).tolist()
        return self._permutation[1]


def eval_batches(rows: Sequence[Row], *, max_tokens: int) -> Iterator[Batch]:
    """All rows once, in order, in batches of at most `max_tokens` tokens or of one row."""
    start, size = 0, 0
    for number, row in enumerate(rows):
        if number > start and size + len(row) > max_tokens:
            yield rows_to_batch(rows[start:number], range(start, number))
            start, size = number, 0
        size += len(row)
    if start < len(rows):
        yield rows_to_batch(rows[start:], range(start, len(rows)))


def rows_to_batch(rows: Sequence[Row], row_ids: Sequence[int]) -> Batch:
    """Lay rows end to end; every document of every row stays a document."""
    doc_lens = [length for row in rows for length in row.doc_lens]
    labels = _joined([row.labels for row in rows])
    return Batch(
        input_ids=_joined([row.input_ids for row in rows]),
        labels=labels,
        position_ids=_joined([row.position_ids for row in rows]),
        cu_seq_lens=torch.tensor([0, *accumulate(doc_lens)], dtype=torch.int32),
        max_doc_len=max(doc_lens),
        num_target_tokens=sum(row.num_target_tokens for row in rows),
        row_ids=tuple(row_ids),
    )


def next_labels(labels: Tensor) -> Tensor:
    """The label that each position predicts; the last position predicts none.

    The labels move by one position here and nowhere else.

    Shapes:
        labels: (1, T) -> (T,).

    >>> next_labels(torch.tensor([[-100, 5, 6]])).tolist()
    [5, 6, -100]
    """
    labels_T = labels.flatten()
    return torch.cat([labels_T[1:], labels_T.new_full((1,), NOT_TARGET)])


def _joined(parts: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts)).unsqueeze(0)
