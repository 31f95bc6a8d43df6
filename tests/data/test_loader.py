"""The order of rows is a function of (seed, step); micro-batches only cut it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nibble.data.chat import NOT_TARGET, Example
from nibble.data.loader import Loader, eval_batches, rows_to_batch
from nibble.data.packing import pack


def make_rows(num_rows, *, packing=False):
    examples = []
    for line in range(num_rows):
        size = 3 + line % 7
        ids = [line * 100 + i for i in range(size)]
        examples.append(Example(ids, [NOT_TARGET, NOT_TARGET, *ids[2:]], "a", line))
    return pack(examples, max_seq_len=16, packing=packing)


def make_loader(rows, **changes):
    settings = {"batch_size": 16, "micro_batch_size": 4, "seed": 0} | changes
    return Loader(rows, **settings)


def test_an_epoch_visits_every_row_once_and_epochs_differ():
    loader = make_loader(make_rows(41))
    assert loader.steps_per_epoch == 3
    epochs = [[i for s in range(e * 3, e * 3 + 3) for i in loader.row_ids(s)] for e in range(3)]
    assert all(sorted(epoch) == list(range(41)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert len(loader.row_ids(2)) == 9


def test_the_order_is_frozen():
    assert make_loader(make_rows(8), batch_size=8).row_ids(0) == [2, 6, 0, 4, 1, 3, 5, 7]


def test_seeds_differ_and_any_step_can_be_first():
    rows = make_rows(30)
    loader = make_loader(rows)
    steps = [loader.row_ids(step) for step in range(9)]
    for step in (8, 0, 5, 3):
        assert make_loader(rows).row_ids(step) == steps[step]
    assert make_loader(rows, seed=1).row_ids(0) != steps[0]
    assert make_loader(rows, seed=2**40).row_ids(0) != steps[0]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 20), st.integers(1, 5), st.integers(0, 12))
def test_ranks_share_the_rows_of_one_rank(num_rows, batch_size, world_size, step):
    rows = make_rows(num_rows)
    one = make_loader(rows, batch_size=batch_size)
    seen, targets = [], 0
    for rank in range(world_size):
        loader = make_loader(rows, batch_size=batch_size, rank=rank, world_size=world_size)
        batches = loader.micro_batches(step)
        seen += [i for batch in batches for i in batch.row_ids]
        targets += sum(batch.num_target_tokens for batch in batches)
        assert loader.num_target_tokens(step) == one.num_target_tokens(step)
    assert sorted(seen) == sorted(one.row_ids(step))
    assert targets == one.num_target_tokens(step)


@pytest.mark.parametrize("packing", [False, True])
def test_micro_batches_cut_the_same_step(packing):
    rows = make_rows(37, packing=packing)
    whole = None
    for size in (1, 4, 16):
        batches = make_loader(rows, micro_batch_size=size).micro_batches(0)
        step = tuple(
            torch.cat([getattr(batch, name) for batch in batches], dim=1).tolist()
            for name in ("input_ids", "labels", "position_ids")
        )
        lens = [n for batch in batches for n in batch.cu_seq_lens.diff().tolist()]
        whole = whole or (step, lens)
        assert (step, lens) == whole
        assert all(len(batch.row_ids) <= size for batch in batches)


def test_a_batch_is_documents_end_to_end():
    rows = make_rows(3)
    batch = rows_to_batch(rows, (0, 1, 2))
    assert batch.input_ids.shape == batch.labels.shape == batch.position_ids.shape == (1, 12)
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
    assert batch.cu_seq_lens.tolist() == [0, 3, 7, 12]
    assert batch.cu_seq_lens.dtype == torch.int32
    assert batch.max_doc_len == 5
    assert batch.position_ids[0].tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 3, 4]
    assert batch.num_target_tokens == 1 + 2 + 3
    starts = batch.cu_seq_lens[:-1].long()
    assert (batch.labels[0, starts] == NOT_TARGET).all()
    moved = batch.to("cpu")
    assert torch.equal(moved.input_ids, batch.input_ids)
    assert moved.row_ids == (0, 1, 2)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 30), st.integers(1, 60), st.booleans())
def test_eval_batches_see_every_row_once_within_the_limit(num_rows, max_tokens, packing):
    rows = make_rows(num_rows, packing=packing)
    batches = list(eval_batches(rows, max_tokens=max_tokens))
    assert [i for batch in batches for i in batch.row_ids] == list(range(len(rows)))
    for batch in batches:
        assert batch.input_ids.shape[1] <= max_tokens or len(batch.row_ids) == 1


@pytest.mark.parametrize(
    "changes",
    [{"batch_size": 0}, {"micro_batch_size": 0}, {"rank": 1}, {"rank": -1}, {"world_size": 0}],
)
def test_impossible_sizes_are_refused(changes):
    with pytest.raises(ValueError, match="at least 1"):
        make_loader(make_rows(3), **changes)


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="at least one row"):
        make_loader([])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 20), st.integers(1, 5), st.integers(0, 5))
def test_even_ranks_make_as_many_passes_and_the_same_rows(num_rows, batch_size, world_size, step):
    rows, sizes = make_rows(num_rows), {"batch_size": batch_size, "world_size": world_size}
    loaders = [make_loader(rows, rank=rank, is_even=True, **sizes) for rank in range(world_size)]
    batches = [loader.micro_batches(step) for loader in loaders]
    assert len({len(own) for own in batches}) == 1
    for loader, own in zip(loaders, batches, strict=True):
        blanks = [batch for batch in own if not batch.row_ids]
        assert all(b.num_target_tokens == 0 and b.input_ids.numel() for b in blanks)
        expected = make_loader(rows, rank=loader.rank, **sizes).micro_batches(step)
        assert [b.row_ids for b in own if b.row_ids] == [b.row_ids for b in expected]
    all_ids = [i for batch in loaders[0].all_batches(step) for i in batch.row_ids]
    assert sorted(all_ids) == sorted(loaders[0].row_ids(step))
