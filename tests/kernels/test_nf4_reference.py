"""The format: tables, packing, scales; bit-equal to bitsandbytes where that defines it."""

import bitsandbytes.functional as bnb
import pytest
import torch

from nibble.errors import ModelError
from nibble.kernels.nf4 import quantize
from nibble.kernels.nf4_reference import (
    ASCENDING,
    CODEBOOKS,
    DYNAMIC_MAP,
    Quantized,
    bounds,
    dequantize_scales,
    encode_reference,
    quantize_scales,
)


@pytest.mark.parametrize("type", CODEBOOKS)
def test_codebook_equals_bitsandbytes(type):
    assert torch.equal(CODEBOOKS[type], bnb.get_4bit_type(type, device="cpu"))


@pytest.mark.parametrize("type", CODEBOOKS)
def test_ascending_sorts_the_codebook(type):
    ascending = CODEBOOKS[type][list(ASCENDING[type])]
    assert sorted(ASCENDING[type]) == list(range(16))
    assert (ascending[1:] >= ascending[:-1]).all()
    assert (bounds(type)[1:] >= bounds(type)[:-1]).all()


def test_dynamic_map_equals_bitsandbytes():
    assert torch.equal(DYNAMIC_MAP, bnb.create_dynamic_map())


def test_first_code_is_the_high_nibble():
    codes, scale_N = torch.zeros(2, dtype=torch.uint8), torch.zeros(1)
    encode_reference(
        torch.tensor([-2.0, 2.0, 0.0]), codes, scale_N, type="nf4", block_size=64, measure=True
    )
    # codes -1 -> 0, +1 -> 15, 0 -> 7, and the nibble that is left over holds zero's code too
    assert codes.tolist() == [0x0F, 0x77]
    assert scale_N.tolist() == [2.0]


@pytest.mark.parametrize("type", CODEBOOKS)
@pytest.mark.parametrize("scale", [0.3, 1e-39])
def test_a_negative_scale_gives_the_codes_of_the_negated_values(type, scale):
    values = torch.randn(100, generator=torch.Generator().manual_seed(0)) * scale
    written = []
    for sign in (1, -1):
        codes, scale_N = torch.zeros(50, dtype=torch.uint8), torch.full((2,), scale * sign)
        encode_reference(values * sign, codes, scale_N, type=type, block_size=64, measure=False)
        written.append(codes)
    assert torch.equal(*written)


@pytest.mark.parametrize("size", [1, 255, 256, 257, 5000])
@pytest.mark.parametrize("factor", [1.0, 1e-3, 1e-39, 1e-42, 1e38, 0.0])
def test_scales_equal_bitsandbytes(size, factor):
    scale_N = torch.rand(size, generator=torch.Generator().manual_seed(size)) * factor
    codes, nested_absmax, offset = quantize_scales(scale_N)
    expected, state = bnb.quantize_blockwise(scale_N - scale_N.mean(), blocksize=256)
    assert torch.equal(codes, expected)
    assert torch.equal(nested_absmax, state.absmax)
    assert torch.equal(offset, scale_N.mean().view(1))


def test_scales_of_a_range_equal_the_whole():
    q = quantize(torch.randn(64 * 700), double=True)
    whole = dequantize_scales(q)
    assert torch.equal(dequantize_scales(q, 250, 531), whole[250:531])


def test_nested_scale_is_rounded_twice():
    q = quantize(torch.randn(64 * 4096), double=True)
    product = DYNAMIC_MAP[q.absmax.long()] * q.nested_absmax.repeat_interleave(256)
    assert torch.equal(dequantize_scales(q), product + q.offset)
    fused = (DYNAMIC_MAP[q.absmax.long()].double() * q.nested_absmax.double().repeat_interleave(256)
             + q.offset.double()).float()  # fmt: skip
    assert not torch.equal(dequantize_scales(q), fused)


def test_llama_7b_shape_costs_4127_bits_per_1000_parameters():
    numel = 4096 * 11008
    num_blocks = numel // 64
    q = Quantized(
        torch.empty(numel // 2, dtype=torch.uint8, device="meta"),
        torch.empty(num_blocks, dtype=torch.uint8, device="meta"),
        torch.empty(num_blocks // 256, device="meta"),
        torch.empty(1, device="meta"),
        (4096, 11008),
    )
    assert q.nbytes * 8 / q.numel == pytest.approx(4.127, abs=5e-4)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"codes": torch.zeros(31, dtype=torch.uint8)}, "codes"),
        ({"absmax": torch.zeros(1, dtype=torch.bfloat16)}, "absmax"),
        ({"offset": torch.zeros(1, dtype=torch.bfloat16)}, "offset"),
        ({"nested_absmax": torch.zeros(2)}, "nested_absmax"),
    ],
)
def test_part_of_another_dtype_or_length_is_refused(change, named):
    q = quantize(torch.randn(64))
    with pytest.raises(ModelError, match=f"{named} of a 4-bit weight"):
        Quantized(**{**vars(q), **change})
