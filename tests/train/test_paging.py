"""Pages change where the moments are, never what they are."""

from collections import deque

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from nibble.data.chat import Example
from nibble.data.loader import rows_to_batch
from nibble.data.packing import pack
from nibble.kernels.target import planned_device
from nibble.model.adapt import adapt
from nibble.model.load import load_base
from nibble.train import paging
from nibble.train.checkpoint import TrainState, latest, restore, save
from nibble.train.loss import token_loss
from nibble.train.optimizer import AdamW, ParameterGroup, parameter_groups
from nibble.train.paging import PagedMoments, count_bytes, cut_pages
from nibble.train.state8bit import Moments8, Moments32
from nibble.train.step import train_step

PAGE_BYTES = {32: 2048 * 2, 8: 520 * 2}
SHAPES = (((3, 300), (7,), (511,)), ((1030,), (2, 2)))


def _joined(pieces):
    return {name: torch.cat(parts) for name, parts in pieces.items()}


class LateCopies:
    """A side stream that copies as late as it may: when somebody waits for the copy."""

    stall_seconds = 0.0

    def __init__(self, device):
        self._asked = deque()
        self._num_asked = 0
        self._num_done = 0

    def copy(self, target, source):
        self._asked.append((target, source))
        self._num_asked += 1
        return self._num_asked

    def wait(self, done):
        while done is not None and self._num_done < done:
            target, source = self._asked.popleft()
            target.copy_(source)
            self._num_done += 1

    def synchronize(self):
        self.wait(self._num_asked)


def _optimizer(*, dtype=torch.float32, **options):
    generator = torch.Generator().manual_seed(0)
    groups = [
        ParameterGroup(
            tuple(nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes),
            lr_ratio,
        )
        for shapes, lr_ratio in zip(SHAPES, (1.0, 4.0), strict=True)
    ]
    return AdamW(groups, weight_decay=0.1, **options)


def _train(optimizer, first, last):
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for group in optimizer.groups:
            for parameter in group.parameters:
                parameter.grad.copy_(torch.randn(parameter.shape, generator=generator))
        optimizer.step(1e-2)
    return optimizer


def _assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("copies", [paging.SideCopies, LateCopies])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [32, 8])
def test_same_bits_as_unpaged(monkeypatch, bits, dtype, copies):
    monkeypatch.setattr(paging, "SideCopies", copies)
    options = {"bits": bits, "page_bytes": PAGE_BYTES[bits], "dtype": dtype}
    paged = _train(_optimizer(is_paged=True, **options), 0, 200)
    _assert_equal(
        _joined(paged.state_pieces()), _joined(_train(_optimizer(**options), 0, 200).state_pieces())
    )
    sizes = [1418, 1034]
    num_pages = sum(-(-size // 512) for size in sizes)
    num_bytes = sum(count_bytes(paged._format.parts, size) for size in sizes)
    moments = paged.moments
    assert (moments.pages_in, moments.pages_out) == (200 * num_pages, 200 * num_pages)
    assert moments.bytes_moved == 2 * 200 * num_bytes
    assert moments.device_bytes == 2 * PAGE_BYTES[bits]


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("budget_in_pages", [2, 3, 5, 6, 100])
def test_budget_bounds_what_is_on_the_device(bits, budget_in_pages):
    page_bytes = PAGE_BYTES[bits]
    options = {"bits": bits, "page_bytes": page_bytes}
    budget = budget_in_pages * page_bytes
    paged = _train(_optimizer(is_paged=True, budget_bytes=budget, **options), 0, 3)
    _assert_equal(
        _joined(paged.state_pieces()), _joined(_train(_optimizer(**options), 0, 3).state_pieces())
    )
    assert paged.moments.device_bytes <= budget
    num_moving = 0 if budget_in_pages >= 6 else 6 - (budget_in_pages - 2)
    assert paged.moments.pages_in == 3 * num_moving
    assert (paged.moments.stall_seconds > 0) == (num_moving > 0)


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("first", [False, True])
def test_checkpoints_are_interchangeable_and_exact(bits, first):
    def make(is_paged):
        return _optimizer(bits=bits, is_paged=is_paged, page_bytes=PAGE_BYTES[bits])

    half = _train(make(first), 0, 10)
    other = make(not first)
    other.load_state(
        {k: v.clone() for k, v in _joined(half.state_pieces()).items()}, num_steps=half.num_steps
    )
    _assert_equal(_joined(half.state_pieces()), _joined(other.state_pieces()))
    _assert_equal(
        _joined(_train(other, 10, 20).state_pieces()),
        _joined(_train(make(first), 0, 20).state_pieces()),
    )


@settings(deadline=None)
@given(st.lists(st.integers(1, 5000), min_size=1, max_size=4), st.integers(2048, 20000))
def test_pages_cover_every_value_once(sizes, page_bytes):
    for format in (Moments32(), Moments8(torch.device("cpu"))):
        pages = cut_pages(format.parts, sizes, page_bytes)
        covered = [(p.group, v) for p in pages for v in range(p.values.start, p.values.stop)]
        assert covered == [(group, v) for group, size in enumerate(sizes) for v in range(size)]
        assert all(count_bytes(format.parts, p.num_values) <= page_bytes for p in pages)


def test_too_small_a_budget_or_page_is_refused():
    parts, cpu = Moments32.parts, torch.device("cpu")
    with pytest.raises(ValueError, match="at least 8192: two pages"):
        PagedMoments(parts, [10], cpu, page_bytes=4096, budget_bytes=8191)
    with pytest.raises(ValueError, match="page_bytes is 2047, expected at least 2048"):
        PagedMoments(parts, [10], cpu, page_bytes=2047)


@pytest.mark.parametrize("bits", [32, 8])
def test_a_step_runs_on_tensors_without_values(bits):
    with planned_device("cuda"), FakeTensorMode():
        optimizer = _optimizer(bits=bits, is_paged=True, page_bytes=PAGE_BYTES[bits])
        optimizer.step(1e-2)
    assert optimizer.moments.pages_out == 6


@pytest.mark.parametrize("bits", [32, 8])
def test_a_model_trains_the_same_way_and_resumes_the_other_way(tiny_model_folder, tmp_path, bits):
    """200 steps, all pages out and in at each; halfway, each takes the other's place."""

    def make(is_paged):
        model, _ = load_base(str(tiny_model_folder("llama")), "nf4")
        adapt(model, rank=4, alpha=8, generator=torch.Generator().manual_seed(0))
        groups = parameter_groups(model)
        options = {"bits": bits, "is_paged": is_paged, "page_bytes": PAGE_BYTES[bits]}
        return model.train(), AdamW(groups, **options)

    def train(model, optimizer, first, last):
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            ids = torch.randint(5, 261, (20,), generator=generator).tolist()
            rows = pack([Example(ids, ids, "", 0)], max_seq_len=20)
            batch = rows_to_batch(rows, [0])
            train_step(
                lambda b: token_loss(model, b), [batch], optimizer, lr=1e-3, max_grad_norm=1.0
            )

    runs = {is_paged: make(is_paged) for is_paged in (False, True)}
    for is_paged, (model, optimizer) in runs.items():
        train(model, optimizer, 0, 100)
        save(tmp_path / str(is_paged), TrainState(100), optimizer, identity={})
        train(model, optimizer, 100, 200)
    paged = runs[True][1].moments
    assert paged.pages_out == paged.pages_in == 200 * len(paged._pages)
    assert len(paged._pages) > 10
    expected = {
        name: value.clone() for name, value in _joined(runs[False][1].state_pieces()).items()
    }
    _assert_equal(_joined(runs[True][1].state_pieces()), expected)
    for is_paged in runs:
        model, optimizer = make(is_paged)
        found, _ = latest(tmp_path / str(not is_paged))
        assert restore(found, optimizer) == TrainState(100)
        train(model, optimizer, 100, 200)
        _assert_equal(_joined(optimizer.state_pieces()), expected)
