"""Attention by blocks against torch's own."""

from itertools import accumulate

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
    has_own_attention,
)


@pytest.fixture(autouse=True, params=["compiled", "torch"])
def code(request, monkeypatch):
    """The code that makes probabilities of scores."""
    if request.param == "torch":
        monkeypatch.setattr(layers_cpu, "load", lambda: None)
    elif layers_cpu.load() is None:
        pytest.skip("needs a C compiler")


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=str)
def in_type(request, monkeypatch):
    """The type in which bfloat16 is multiplied: itself where there are matrix units."""
    monkeypatch.setattr(products, "cpu_product_dtype", lambda: request.param)
    monkeypatch.setattr(module, "has_matrix_units", lambda: request.param == torch.bfloat16)


def states(lengths=(5, 1, 13), heads=6, groups=2, width=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, count, sum(lengths), width) for count in (heads, groups, groups)]
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


def outcome(function, inputs, lengths=(5, 1, 13), scale=0.3):
    """Value and gradients; heads lie beside one another, as a model's projections give them."""
    strided = [s.transpose(1, 2).contiguous().transpose(1, 2) for s in inputs]
    y = function(*strided, (0, *accumulate(lengths)), scale)
    direction = torch.linspace(-1, 1, y.numel()).bfloat16().to(y.dtype).view(y.shape)
    return y, *torch.autograd.grad((y * direction).sum(), inputs)


def assert_equal_to_reference(inputs, lengths, tolerance):
    ours = outcome(blocked_attention, inputs, lengths)
    theirs = outcome(blocked_attention_reference, inputs, lengths)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("lengths", [(1,), (2, 1), (13, 1, 5)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
def test_values_and_gradients(groups, lengths, dtype, tolerance):
    inputs = states(lengths, groups=groups, dtype=dtype)
    assert_equal_to_reference(inputs, lengths, tolerance)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=5),
    groups=st.sampled_from([1, 2, 3]),
    repeats=st.sampled_from([1, 2, 5]),
    rows=st.sampled_from([1, 4, 10, 64]),
    num_bytes=st.sampled_from([1, 8000, 10**6]),
)
def test_whatever_the_blocks_are(lengths, groups, repeats, rows, num_bytes):
    inputs = states(lengths, groups * repeats, groups, dtype=torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK_ROWS", rows)
        patch.setattr(module, "BLOCK_BYTES", num_bytes)
        assert_equal_to_reference(inputs, lengths, 2e-5)


def test_several_blocks_of_the_usual_size():
    lengths = (BLOCK_ROWS * 2 + 37, 3)
    assert_equal_to_reference(states(lengths, 4, 2, 16, dtype=torch.float32), lengths, 2e-5)


@pytest.mark.parametrize("lengths", [(1,), (13, 4), (600,)])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("spread", [1, 2])
def test_no_less_exact_in_bfloat16_than_torch(in_type, lengths, groups, spread):
    narrow = states(lengths, 4, groups, 128, dtype=torch.bfloat16)
    query, key, value = (s.detach() for s in narrow)
    narrow = [s.requires_grad_() for s in (query * spread, key * spread, value)]
    exact = [s.detach().double().requires_grad_() for s in narrow]
    truth = outcome(blocked_attention_reference, exact, lengths, 128**-0.5)
    ours = outcome(blocked_attention, narrow, lengths, 128**-0.5)
    theirs = outcome(blocked_attention_reference, narrow, lengths, 128**-0.5)
    for true, mine, other in zip(truth, ours, theirs, strict=True):
        assert mine.dtype == torch.bfloat16
        error, bound = ((x.double() - true).norm() for x in (mine, other))
        # A lone token has no gradient: what float32 leaves of it is no error.
        assert error <= max(1.1 * bound, 4e-3 * true.norm()) + 1e-5


def test_empty_documents_are_passed_over():
    inputs = [s.detach() for s in states((4,), dtype=torch.float32)]
    expected = blocked_attention(*inputs, (0, 1, 4), 0.3)
    assert torch.equal(blocked_attention(*inputs, (0, 1, 1, 4, 4), 0.3), expected)


def test_autocast_changes_nothing(in_type):
    inputs = [s.detach() for s in states(dtype=torch.bfloat16)]
    expected = blocked_attention(*inputs, (0, 5, 6, 19), 0.3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(blocked_attention(*inputs, (0, 5, 6, 19), 0.3), expected)


def test_far_keys_do_not_slow_products_down(in_type):
    """What is below the normal numbers makes a product many times slower."""
    inputs = [40 * s.detach() for s in states((200,), 2, 1, 64, dtype=torch.bfloat16)]
    query, key, _ = inputs
    q_GRTK = module._by_key_head(query, key)
    blocks = module._Blocks(q_GRTK, (0, 200), 1.0, num_products=2)
    q, k = blocks.dense(q_GRTK)[:, :, :128], blocks.dense(key[0])[:, :128]
    if blocks._library is None:
        pytest.skip("torch writes what is below the normal numbers as it is")
    for values in blocks.gradients(q, k, q.flatten(1, 2) * 1e-30, k):
        assert not ((values != 0) & (values.abs() < torch.finfo(torch.float32).tiny)).any()


def test_keeps_its_inputs_alone(in_type):
    inputs = states(dtype=torch.bfloat16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        blocked_attention(*inputs, (0, 5, 6, 19), 0.3)
    assert [t.data_ptr() for t in saved] == [t.data_ptr() for t in inputs]


def test_gradient_by_finite_differences():
    inputs = states((4, 1), heads=2, groups=1, width=3)
    assert torch.autograd.gradcheck(
        lambda *s: blocked_attention(*s, (0, 4, 5), 0.5), inputs, atol=1e-4
    )


def test_no_memory_of_the_square_of_the_length():
    """Values of blocks stay below a bound once a block holds the keys of one key head."""
    allocated = []
    for length in (1024, 2048, 4096):
        q = torch.zeros(4, 1, length, 8)
        blocks = module._Blocks(q, (0, length), 1.0, num_products=2)
        allocated.append(blocks._scores.numel() / length)
    assert allocated[-1] <= 2 * BLOCK_ROWS
    assert allocated[2] <= allocated[0] * 2


def test_when_it_is_used():
    assert has_own_attention(states(dtype=torch.bfloat16)[0])
    assert not has_own_attention(states(dtype=torch.float32)[0])
    assert not has_own_attention(states(dtype=torch.float16)[0])


def _compiled_outcome(inputs, lengths, monkeypatch):
    """Value and gradients by the code that goes through whole documents."""
    library = layers_cpu.load()
    if library is None:
        pytest.skip("needs a C compiler")
    calls = []
    attend = library.attend_documents
    with monkeypatch.context() as patch:
        patch.setattr(module, "has_matrix_units", lambda: False)
        patch.setattr(library, "attend_documents", lambda *a: calls.append(a) or attend(*a))
        found = outcome(blocked_attention, inputs, lengths)
    assert len(calls) == 2
    return found


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lengths=st.lists(st.integers(1, 100), min_size=1, max_size=4),
    groups=st.sampled_from([1, 2, 3]),
    repeats=st.sampled_from([1, 2, 5]),
    width=st.sampled_from([1, 8, 33, 64, 80]),
)
def test_compiled_documents(monkeypatch, lengths, groups, repeats, width):
    inputs = states(lengths, groups * repeats, groups, width, dtype=torch.bfloat16)
    exact = [s.detach().double().requires_grad_() for s in inputs]
    ours = _compiled_outcome(inputs, lengths, monkeypatch)
    for mine, true in zip(ours, outcome(blocked_attention_reference, exact, lengths), strict=True):
        # Rounded once, to 8 bits.
        assert (mine.double() - true).norm() <= 4e-3 * true.norm() + 1e-6


def test_compiled_documents_give_the_same_bits_on_any_number_of_threads(monkeypatch):
    lengths, num_threads = (40, 1, 300), torch.get_num_threads()
    inputs = states(lengths, 6, 2, 64, dtype=torch.bfloat16)
    expected = _compiled_outcome(inputs, lengths, monkeypatch)
    try:
        torch.set_num_threads(4)
        again = _compiled_outcome(inputs, lengths, monkeypatch)
    finally:
        torch.set_num_threads(num_threads)
    assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))


def test_blocks_serve_where_there_are_more_threads_than_documents_and_heads(monkeypatch):
    monkeypatch.setattr(module, "has_matrix_units", lambda: False)
    query, key, value = states((9,), 4, 2, dtype=torch.bfloat16)
    find = module._library_of_documents
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert find(query, key, value, (0, 9), num_products=2) is None
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert find(query, key, value, (0, 9), num_products=2) is layers_cpu.load()
    monkeypatch.setattr(module, "has_matrix_units", lambda: True)
    assert find(query, key, value, (0, 9), num_products=2) is None
    monkeypatch.setattr(module, "has_matrix_units", lambda: False)
    assert find(query.mT, key.mT, value.mT, (0, 8), num_products=2) is None
