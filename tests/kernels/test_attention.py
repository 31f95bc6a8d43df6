"""Attention by blocks against torch's own."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nibble.kernels import attention as module
from nibble.kernels import layers_cpu, products
from nibble.kernels.attention import (
    BLOCK_ROWS,
    blocked_attention,
    blocked_attention_reference,
    cpu_attention,
    has_own_attention,
    wide_attention,
)


@pytest.fixture(autouse=True, params=["compiled", "torch"])
def code(request, monkeypatch):
    """The code that makes probabilities of scores in bfloat16."""
    if request.param == "torch":
        monkeypatch.setattr(layers_cpu, "load", lambda: None)
    elif layers_cpu.load() is None:
        pytest.skip("needs a C compiler")


def states(num_documents=3, heads=6, groups=2, length=13, width=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(num_documents, count, length, width) for count in (heads, groups, groups)]
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


def outcome(function, inputs, scale=0.3):
    """Value and gradients; a document is a slice of (1, T, H, K), as in a model."""
    strided = [s.transpose(1, 2).contiguous().transpose(1, 2) for s in inputs]
    y = function(*strided, scale)
    direction = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return y, *torch.autograd.grad((y * direction).sum(), inputs)


def assert_equal_to_reference(inputs, tolerance, function=blocked_attention):
    ours = outcome(function, inputs)
    theirs = outcome(blocked_attention_reference, inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("length", [1, 2, 13])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)]
)
def test_values_and_gradients(groups, length, dtype, tolerance):
    assert_equal_to_reference(states(groups=groups, length=length, dtype=dtype), tolerance)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    documents=st.integers(1, 5),
    groups=st.sampled_from([1, 2, 3]),
    repeats=st.sampled_from([1, 2, 5]),
    length=st.integers(1, 70),
    rows=st.sampled_from([1, 4, 10, 64]),
    values=st.sampled_from([1, 2000, 10**6]),
)
def test_whatever_the_blocks_are(documents, groups, repeats, length, rows, values):
    inputs = states(documents, groups * repeats, groups, length, dtype=torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK_ROWS", rows)
        patch.setattr(module, "BLOCK_VALUES", values)
        assert_equal_to_reference(inputs, 2e-5)


def test_several_blocks_of_the_usual_size():
    inputs = states(1, 4, 2, BLOCK_ROWS * 2 + 37, 16, dtype=torch.float32)
    assert_equal_to_reference(inputs, 2e-5)


def test_errors_in_bfloat16_are_those_of_torch():
    exact = states(1, 4, 2, 600, 64)
    narrow = [s.detach().bfloat16().requires_grad_() for s in exact]
    truth = outcome(
        blocked_attention_reference, [s.detach().double().requires_grad_() for s in narrow], 0.125
    )
    ours = outcome(blocked_attention, narrow, 0.125)
    theirs = outcome(blocked_attention_reference, narrow, 0.125)
    for true, mine, other in zip(truth, ours, theirs, strict=True):
        error, bound = ((x.double() - true).norm() / true.norm() for x in (mine, other))
        assert error < max(3 * bound, 6e-3)


def test_gradient_by_finite_differences():
    inputs = states(num_documents=1, heads=2, groups=1, length=4, width=3)
    assert torch.autograd.gradcheck(lambda *s: blocked_attention(*s, 0.5), inputs, atol=1e-4)


def test_no_memory_of_the_square_of_the_length():
    """Values of blocks stay below a bound once a block holds the keys of one pair."""
    allocated = []
    for length in (1024, 2048, 4096):
        q = torch.zeros(4, 1, length, 8)
        blocks = module._Blocks(q, 1.0, num_products=2)
        allocated.append(blocks._scores.numel() / length)
    assert allocated[-1] <= 2 * BLOCK_ROWS
    assert allocated[2] <= allocated[0] * 2


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("length", [1, 13, 300])
def test_wide_values_and_gradients(groups, length):
    inputs = states(groups=groups, length=length, dtype=torch.bfloat16)
    exact = [s.detach().double().requires_grad_() for s in inputs]
    truth = outcome(blocked_attention_reference, exact)
    for ours, true in zip(outcome(wide_attention, inputs), truth, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.double() - true).norm() <= 6e-3 * true.norm() + 1e-9


def test_wide_keeps_nothing_wide_but_a_sum_of_each_row():
    query, key, value = states(length=13, dtype=torch.bfloat16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        wide_attention(query, key, value, 0.3)
    wide = [t for t in saved if t.dtype != torch.bfloat16]
    assert sum(t.numel() for t in wide) == query.numel() // query.shape[-1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_faster_one_is_taken(monkeypatch, dtype):
    monkeypatch.setattr(products, "cpu_product_dtype", lambda: dtype)
    inputs = [s.detach() for s in states(length=40, dtype=torch.bfloat16)]
    function = blocked_attention if dtype == torch.bfloat16 else wide_attention
    assert torch.equal(cpu_attention(*inputs, 0.3), function(*inputs, 0.3))


def test_when_it_is_used():
    assert has_own_attention(states(dtype=torch.bfloat16)[0])
    assert not has_own_attention(states(dtype=torch.float32)[0])
    assert not has_own_attention(states(dtype=torch.float16)[0])
