"""quantize and dequantize: bit-equal to bitsandbytes, and to an own formula where that is wrong."""

import dataclasses
from pathlib import Path
from unittest import mock

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from nibble.errors import ModelError, UsageError
from nibble.kernels import nf4, nf4_cpu
from nibble.kernels.nf4_reference import bounds

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = st.one_of(
    st.tuples(st.integers(1, 3000)),
    st.tuples(st.integers(1, 70), st.integers(1, 200)),
    st.tuples(st.integers(1, 30), st.integers(1, 5).map(lambda n: 64 * n)),
    st.tuples(st.integers(1, 5), st.integers(1, 40), st.integers(1, 70)),
)


@st.composite
def weights(draw):
    """Gaussian weights of any shape and scale with edges: zero blocks, an outlier, subnormals."""
    shape, dtype = draw(SHAPES), draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = 10.0 ** draw(st.sampled_from([-44, -40, -38, -20, -7, -4, -2, 0, 3]))
    weight = torch.randn(shape, generator=generator) * scale
    flat = weight.view(-1)
    edge = draw(st.sampled_from(["plain", "zeros", "zero_block", "outlier", "ties"]))
    if edge == "zeros":
        flat.zero_()
    elif edge == "zero_block":
        flat[: draw(st.integers(1, 200))] = 0
    elif edge == "outlier":
        flat[draw(st.integers(0, flat.numel() - 1))] = draw(st.sampled_from([-6e4, 6e4]))
    elif edge == "ties":
        flat.copy_(torch.randint(-16, 17, (flat.numel(),), generator=generator) / 16)
    return weight.to(dtype)


def is_right_in_bitsandbytes(shape):
    """Its CPU code is wrong for some last dimensions; odd ones are compiled first, and slow."""
    return shape[-1] % 64 == 0 or (len(shape) == 1 and shape[0] % 2 == 0 and shape[0] > 2)


def formula(codes, absmax, codebook, shape):
    """code * absmax in float32, from the stored bytes, in numpy."""
    byte = codes.numpy()
    code = np.stack([byte >> 4, byte & 15], axis=1).reshape(-1)[: int(np.prod(shape))]
    scale = np.repeat(absmax.numpy(), 64)[: code.size]
    return torch.from_numpy((codebook.numpy()[code] * scale).reshape(shape))


def oracle_absmax(state):
    if not state.nested:
        return state.absmax
    return bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset


@settings(max_examples=200, deadline=None)
@given(weight=weights(), type=st.sampled_from(["nf4", "fp4"]), double=st.booleans())
def test_equals_bitsandbytes(weight, type, double):
    q = nf4.quantize(weight, type=type, double=double)
    codes, state = bnb.quantize_4bit(
        weight, quant_type=type, compress_statistics=double, blocksize=64
    )
    assert torch.equal(q.codes, codes.view(-1))
    assert torch.equal(q.absmax, state.absmax)
    with mock.patch.object(nf4_cpu, "load", return_value=None):
        plain = nf4.quantize(weight, type=type, double=double)
    assert torch.equal(plain.codes, q.codes)
    assert torch.equal(plain.absmax, q.absmax)
    if double:
        assert torch.equal(q.nested_absmax, state.state2.absmax)
        assert torch.equal(q.offset, state.offset.view(1))
    expected = formula(codes.view(-1), oracle_absmax(state), state.code, weight.shape)
    for dtype in DTYPES:
        got = nf4.dequantize(q, dtype=dtype)
        assert torch.equal(got, expected.to(dtype))
        assert torch.equal(got, nf4.dequantize_reference(q, dtype=dtype))
        if is_right_in_bitsandbytes(weight.shape):
            state.dtype = dtype
            oracle = bnb.dequantize_4bit(codes, state).view(weight.shape)
            # Its conversion to bfloat16 turns subnormal float32 values to zero on some CPUs.
            is_subnormal = expected.abs() < torch.finfo(torch.float32).tiny
            is_flushed = (oracle == 0) & is_subnormal & (dtype == torch.bfloat16)
            assert torch.equal(got.where(~is_flushed, 0), oracle.where(~is_flushed, 0))


@pytest.mark.parametrize("type", ["nf4", "fp4"])
def test_values_beside_a_bound_equal_bitsandbytes(type):
    # A full block, and a last and shorter one, which is rounded in another way.
    bound, infinity = bounds(type), torch.tensor(float("inf"))
    generator = torch.Generator().manual_seed(0)
    for scale in 10 ** (torch.rand(200, generator=generator) * 60 - 30):
        at = bound * scale
        near = torch.cat([at, at.nextafter(infinity), at.nextafter(-infinity), scale.view(1)])
        weight = torch.cat([near, torch.zeros(64 - near.numel()), near])
        codes, _ = bnb.quantize_4bit(weight, quant_type=type, blocksize=64)
        assert torch.equal(nf4.quantize(weight, type=type).codes, codes.view(-1))


@settings(max_examples=50, deadline=None)
@given(weight=weights(), block_size=st.sampled_from(nf4.BLOCK_SIZES), double=st.booleans())
def test_every_block_size_equals_bitsandbytes(weight, block_size, double):
    q = nf4.quantize(weight, block_size=block_size, double=double)
    codes, state = bnb.quantize_4bit(
        weight, quant_type="nf4", compress_statistics=double, blocksize=block_size
    )
    assert torch.equal(q.codes, codes.view(-1))
    assert torch.equal(q.absmax, state.absmax)
    assert torch.equal(nf4.dequantize(q), nf4.dequantize_reference(q))


def test_reference_quantises_to_the_same_bits(monkeypatch):
    weight = torch.randn(3, 1000, 501).to(torch.bfloat16)
    fast = nf4.quantize(weight)
    monkeypatch.setattr(nf4_cpu, "load", lambda: None)
    plain = nf4.quantize(weight)
    assert nf4.implementation() == nf4_cpu.implementation()
    for name in ("codes", "absmax", "nested_absmax", "offset"):
        assert torch.equal(getattr(fast, name), getattr(plain, name))
    assert torch.equal(nf4.dequantize(fast), nf4.dequantize(plain))


def test_weight_that_is_not_contiguous_is_read_by_rows():
    weight = torch.randn(96, 130)
    q, expected = nf4.quantize(weight.t()), nf4.quantize(weight.t().contiguous())
    assert torch.equal(q.codes, expected.codes)
    assert q.shape == (130, 96)


def test_float64_is_rounded_to_float32_first():
    weight = torch.randn(100, dtype=torch.float64)
    assert torch.equal(nf4.quantize(weight).codes, nf4.quantize(weight.float()).codes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("start", "count"), [(0, 64), (128, 1000), (62, 3), (63, 130), (7, 1)])
def test_part_equals_the_same_part_of_the_whole(start, count, dtype):
    q = nf4.quantize(torch.randn(37, 71))
    whole = nf4.dequantize(q, dtype=dtype).view(-1)
    part = nf4.dequantize(q, dtype=dtype, start=start, count=count)
    assert torch.equal(part, whole[start : start + count])
    assert torch.equal(part, nf4.dequantize_reference(q, dtype=dtype, start=start, count=count))


@pytest.mark.parametrize("shape", [(5, 16, 96), (3, 7, 9), (4, 64)])
def test_slice_is_one_expert(shape):
    q = nf4.quantize(torch.randn(shape))
    whole = nf4.dequantize(q)
    for index in range(shape[0]):
        assert torch.equal(nf4.dequantize_slice(q, index), whole[index])


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("double", [False, True])
def test_a_weight_in_parts_gives_the_bits_of_the_whole(double, search):
    weight = torch.randn(5, 16, 96)
    whole = nf4.quantize(weight, double=double, search=search)
    readers = [lambda e=e: e for e in weight]
    parts = nf4.quantize_parts(readers, (5, 16, 96), double=double, search=search)
    assert torch.equal(parts.codes, whole.codes)
    assert torch.equal(parts.absmax, whole.absmax)
    with pytest.raises(UsageError, match="do not end at blocks"):
        nf4.quantize_parts(readers, (5, 16, 97))


def test_tensors_without_memory_never_reach_the_compiled_code():
    q = nf4.quantize(torch.randn(8, 70))
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = nf4.dequantize(q)
    meta = dataclasses.replace(
        q,
        **{
            name: getattr(q, name).to("meta")
            for name in ("codes", "absmax", "nested_absmax", "offset")
        },
    )
    for got in (fake, nf4.dequantize(meta)):
        assert (got.shape, got.dtype) == ((8, 70), torch.bfloat16)


def test_out_is_written_in_place():
    q = nf4.quantize(torch.randn(8, 70))
    out = torch.full((8 * 70,), float("nan"), dtype=torch.bfloat16)
    got = nf4.dequantize(q, out=out)
    assert got.data_ptr() == out.data_ptr()
    assert got.shape == (8, 70)
    assert torch.equal(got, nf4.dequantize(q))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"type": "nf5"}, "quant.type"),
        ({"block_size": 48}, "quant.block_size"),
    ],
)
def test_unknown_arguments_are_refused(arguments, named):
    with pytest.raises(UsageError, match=named):
        nf4.quantize(torch.ones(64), **arguments)


def test_integers_are_refused():
    with pytest.raises(UsageError, match="int64"):
        nf4.quantize(torch.ones(64, dtype=torch.int64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("position", [0, 70, 128])
def test_values_that_are_not_finite_are_refused(bad, position, dtype):
    weight = torch.randn(129).to(dtype)
    weight[position] = bad
    with pytest.raises(ModelError, match="NaN or infinite"):
        nf4.quantize(weight)


def test_empty_weight_is_refused():
    with pytest.raises(ModelError, match="empty"):
        nf4.quantize(torch.ones(0, 64))


@pytest.mark.parametrize(
    "arguments",
    [
        {"start": 60, "count": 10},
        {"start": -1, "count": 4},
        {"dtype": torch.float64},
        {"out": torch.empty(63, dtype=torch.bfloat16)},
        {"out": torch.empty(64)},
        {"out": torch.empty(128, dtype=torch.bfloat16)[::2]},
    ],
)
def test_range_and_out_must_fit(arguments):
    q = nf4.quantize(torch.randn(64))
    for function in (nf4.dequantize, nf4.dequantize_reference):
        with pytest.raises(UsageError):
            function(q, **arguments)


def test_slice_outside_is_refused():
    with pytest.raises(UsageError, match="index 4"):
        nf4.dequantize_slice(nf4.quantize(torch.randn(4, 64)), 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_quantising_needs_little_memory_beside_the_result(dtype):
    weight = torch.ones(8192, 8192, dtype=dtype)  # 128 MiB
    nf4.quantize(weight[:64])
    before = reset_peak_memory_bytes()
    q = nf4.quantize(weight)
    assert peak_memory_bytes() - before < q.nbytes + 60 * 2**20


def reset_peak_memory_bytes():
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("the system does not let a process reset its peak memory")
    return peak_memory_bytes()


def peak_memory_bytes():
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
