"""Scales of least squared error: never worse than the largest magnitude, in the same format."""

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nibble.kernels import nf4, nf4_cpu, nf4_search
from nibble.kernels.nf4_reference import CODEBOOKS, DYNAMIC_MAP, bounds

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TYPES = st.sampled_from(sorted(CODEBOOKS))


@st.composite
def weights(draw):
    """Weights of many shapes and distributions, with edges: zeros, outliers, one-sided blocks."""
    shape = draw(
        st.one_of(
            st.tuples(st.integers(1, 2000)),
            st.tuples(st.integers(1, 40), st.integers(1, 200)),
            st.tuples(st.integers(1, 4), st.integers(1, 20), st.integers(1, 70)),
        )
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight = torch.randn(shape, generator=generator)
    flat = weight.view(-1)
    edge = draw(
        st.sampled_from(["plain", "cubed", "zeros", "zero_block", "outlier", "one_sided", "codes"])
    )
    if edge == "cubed":
        flat.pow_(3)
    elif edge == "zeros":
        flat.zero_()
    elif edge == "zero_block":
        flat[: draw(st.integers(1, 200))] = 0
    elif edge == "outlier":
        flat[draw(st.integers(0, flat.numel() - 1))] = draw(st.sampled_from([-6e4, 6e4]))
    elif edge == "one_sided":
        flat.abs_().mul_(draw(st.sampled_from([-1, 1])))
    elif edge == "codes":  # the plain scale is exact
        flat.copy_(CODEBOOKS["nf4"][torch.randint(16, (flat.numel(),), generator=generator)])
    scale = 10.0 ** draw(st.sampled_from([-44, -40, -38, -30, -20, -4, -2, 0, 3, 20, 34, 38]))
    scaled = (weight * scale).clamp(-3e38, 3e38)
    rounded = scaled.to(draw(st.sampled_from(DTYPES)))
    return rounded if rounded.isfinite().all() else scaled


def squared_errors(weight, q):
    """Of each block, in float64."""
    rest = (nf4.dequantize(q, dtype=torch.float32).double() - weight.double()).view(-1)
    return torch.stack([part.square().sum() for part in rest.split(q.block_size)])


def relative_error(weight, q):
    return ((nf4.dequantize(q, dtype=torch.float32) - weight).norm() / weight.norm()).item()


@settings(max_examples=200, deadline=None)
@given(weight=weights(), type=TYPES, block_size=st.sampled_from(nf4.BLOCK_SIZES))
def test_no_block_is_worse_than_at_the_plain_scale(weight, type, block_size):
    plain, found = (
        squared_errors(weight, nf4.quantize(weight, type=type, block_size=block_size, **options))
        for options in ({"double": False}, {"double": False, "search": True})
    )
    assert (found <= plain).all()


@settings(max_examples=200, deadline=None)
@given(weight=weights(), type=TYPES, block_size=st.sampled_from(nf4.BLOCK_SIZES))
def test_no_weight_is_worse_with_scales_in_8_bits(weight, type, block_size):
    plain = nf4.quantize(weight, type=type, block_size=block_size)
    found = nf4.quantize(weight, type=type, block_size=block_size, search=True)
    assert found.nbytes == plain.nbytes
    before, after = (squared_errors(weight, q).sum() for q in (plain, found))
    assert after <= before or not before.isfinite()


@settings(max_examples=100, deadline=None)
@given(weight=weights(), type=TYPES, double=st.booleans())
def test_bitsandbytes_reads_the_same_values(weight, type, double):
    q = nf4.quantize(weight, type=type, double=double, search=True)
    # Whole rows of 64: for other widths its CPU code is wrong.
    rows = q.codes.numel() // 32
    assume(rows > 0)
    nested = None
    if q.nested_absmax is not None:
        code, dtype = DYNAMIC_MAP, torch.float32
        nested = bnb.QuantState(absmax=q.nested_absmax, blocksize=256, code=code, dtype=dtype)
    state = bnb.QuantState(
        absmax=q.absmax[:rows],
        shape=torch.Size([rows, 64]),
        dtype=torch.float32,
        blocksize=64,
        quant_type=type,
        code=CODEBOOKS[type],
        offset=None if q.offset is None else q.offset[0],
        state2=nested,
    )
    expected = bnb.dequantize_4bit(q.codes[: rows * 32].view(-1, 1), state).view(-1)[: q.numel]
    got = nf4.dequantize(q, dtype=torch.float32).view(-1)[: rows * 64]
    # The mean of 8-bit scales above 1e38 is infinite in both.
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("type", "double", "before", "most"),
    [
        ("nf4", True, 0.0920, 0.0830),
        ("nf4", False, 0.0920, 0.0828),
        ("fp4", True, 0.1220, 0.1130),
        ("fp4", False, 0.1220, 0.1130),
    ],
)
def test_error_on_gaussian_weights(type, double, before, most):
    weight = torch.randn(1 << 19, generator=torch.Generator().manual_seed(0))
    plain, found = (
        relative_error(weight, nf4.quantize(weight, type=type, double=double, search=search))
        for search in (False, True)
    )
    assert plain == pytest.approx(before, abs=3e-4)
    assert found <= most


def test_half_of_the_scales_of_gaussian_weights_are_negative():
    weight = torch.randn(1 << 19, generator=torch.Generator().manual_seed(0))
    q = nf4.quantize(weight, double=False, search=True)
    assert (q.absmax < 0).float().mean() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("block_size", nf4.BLOCK_SIZES)
def test_a_finer_search_finds_little_more(block_size):
    weight = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0))
    q = nf4.quantize(weight, block_size=block_size, double=False, search=True)
    weight_NQ, level = weight.view(-1, block_size), nf4_search.levels("nf4")
    found_N = least_N = squared_errors(weight, q)
    for factor in torch.linspace(0.4, 1.5, 221).tolist():
        for sign in (1, -1):
            scale_N1 = weight_NQ.abs().amax(-1, keepdim=True) * factor * sign
            level_NQ = level[torch.bucketize(weight_NQ / scale_N1, bounds("nf4"))]
            error_N = (weight_NQ - scale_N1 * level_NQ).double().square().sum(-1)
            least_N = torch.minimum(least_N, error_N)
    assert found_N.sum() <= least_N.sum() * (1.03 if block_size == 32 else 1.01)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double", [False, True])
def test_neither_code_nor_chunk_changes_the_bits(monkeypatch, dtype, double):
    weight = torch.randn(100_001).to(dtype)
    expected = nf4.quantize(weight, double=double, search=True)
    monkeypatch.setattr(nf4, "CHUNK", 4096)
    chunked = nf4.quantize(weight, double=double, search=True)
    monkeypatch.setattr(nf4_cpu, "load", lambda: None)
    plain = nf4.quantize(weight, double=double, search=True)
    for q in (chunked, plain):
        assert torch.equal(q.codes, expected.codes)
        assert torch.equal(q.absmax, expected.absmax)


def test_a_weight_that_gains_nothing_keeps_the_plain_bits():
    # A block of exact codes, and one of them with another scale: 8 bits could only spoil them.
    values = nf4_search.levels("nf4").repeat(256)
    plain, found = (nf4.quantize(values, search=search) for search in (False, True))
    for name in ("codes", "absmax", "nested_absmax", "offset"):
        assert torch.equal(getattr(found, name), getattr(plain, name))


@pytest.mark.parametrize("double", [False, True])
def test_zeros_stay_zeros(double):
    weight = torch.randn(1000)
    weight[64:192] = 0
    q = nf4.quantize(weight, double=double, search=True)
    assert (nf4.dequantize(q)[64:192] == 0).all()
