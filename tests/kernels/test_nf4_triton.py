"""Decoding by Triton gives the bits of the reference.

On a CUDA device by `pytest -m gpu`; elsewhere `test_triton.py` runs this file by the interpreter.
"""

import os

import pytest
import torch

from nibble.kernels import nf4, nf4_triton
from nibble.kernels.nf4_reference import Quantized, decode_reference

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1",
        reason="needs a CUDA device or TRITON_INTERPRET=1",
    ),
]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def quantized(shape, **options):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator) * 0.02
    weight.view(-1)[0] = 3.0
    return nf4.quantize(weight.to(DEVICE), **options)


def assert_same_bits(q, dtype=torch.bfloat16, start=0, count=None):
    count = q.numel - start if count is None else count
    # Two values more on each side: nothing else is written.
    expected, got = torch.full((2, count + 4), 7.0, dtype=dtype, device=DEVICE)
    decode_reference(q, expected[2:-2], start)
    nf4_triton.decode(q, got[2:-2], start)
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.nan_to_num(nan=0.0), expected.nan_to_num(nan=0.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("type", ["nf4", "fp4"])
@pytest.mark.parametrize(
    "shape", [(64, 64), (5, 66), (7, 65), (3, 100), (17, 192), (1000,), (3, 20, 24), (1,)]
)
def test_every_shape(shape, type, double, dtype):
    assert_same_bits(quantized(shape, type=type, double=double), dtype)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("block_size", nf4.BLOCK_SIZES)
def test_every_block_size(block_size, double):
    q = quantized((3 * block_size + 40,), block_size=block_size, double=double)
    assert_same_bits(q)
    assert_same_bits(q, start=block_size, count=block_size)


def test_scales_of_several_nested_blocks():
    assert_same_bits(quantized((520, 64)))


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(
    ("start", "count"),
    [(0, 0), (0, 1), (64, 128), (8, 8), (8, 3), (128, 891), (1, 1), (3, 64), (63, 2), (1005, 19)],
)
def test_parts(start, count, double):
    assert_same_bits(quantized((1024,), double=double), start=start, count=count)


def test_codes_that_begin_between_words():
    q = quantized((4, 64))
    longer = torch.cat([q.codes[:1], q.codes])[1:]
    moved = Quantized(longer, q.absmax, q.nested_absmax, q.offset, q.shape)
    assert_same_bits(moved)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # numpy, in the interpreter
@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_at_the_edges_of_each_dtype(dtype):
    # Ties, overflow, infinities and NaN, as scales of a block of code +1.
    edges = [0.0, 1.00390625, 1.01171875, 1.00048828125, 1.00146484375, 65504.0, 65519.9, 65520.0]
    edges += [3.39e38, 6.1e-5, 4.3e-5, 5.9604645e-8, 2.98024e-8, float("inf"), float("nan")]
    scale_N = torch.tensor(edges, device=DEVICE)
    codes = torch.full((len(edges) * 32,), 0xF0, dtype=torch.uint8, device=DEVICE)
    q = Quantized(codes, scale_N, None, None, (len(edges) * 64,))
    assert_same_bits(q, dtype)


def test_agrees():
    assert nf4_triton.agrees_with_reference(torch.device(DEVICE))


def test_other_bits_are_noticed(monkeypatch):
    codebook = nf4_triton._tables("nf4", torch.device(DEVICE))[0]
    wrong = codebook.nextafter(codebook + 1), nf4_triton._tables("nf4", torch.device(DEVICE))[1]
    monkeypatch.setattr(nf4_triton, "_tables", lambda type, device: wrong)
    assert not nf4_triton.agrees_with_reference(torch.device(DEVICE))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_is_what_a_cuda_device_uses():
    assert nf4.implementation(DEVICE) == "Triton"
    q = quantized((300, 64))
    assert torch.equal(nf4.dequantize(q), nf4.dequantize_reference(q))
