"""Decoding of 4-bit weights on a CUDA device: one launch, double quantisation inside.

Same bits as `nf4_reference`. The code itself stands in `triton_kernels`.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from nibble.kernels.nf4_reference import (
    BLOCK_SIZE,
    CODEBOOKS,
    DYNAMIC_MAP,
    Quantized,
    decode_reference,
    encode_reference,
    quantize_scales,
)
from nibble.kernels.triton_support import as_weight, is_right, launch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# A thread of four warps takes one word of 8 codes. Source: resources in tests/golden.
WORDS = 128
VALUES = 1024

Decode = Callable[[Quantized, Tensor, int], None]


def decode(q: Quantized, out_flat: Tensor, start: int) -> None:
    """As `decode_reference`, for float32, bfloat16 and float16."""
    count, device = out_flat.numel(), out_flat.device
    codebook, dynamic_map = _tables(q.type, device)
    words = _words(q, start, count)
    codes = q.codes if words is None else words
    weight = as_weight(codes, codebook, q.absmax, dynamic_map, q.nested_absmax, q.offset)
    arguments = device, weight, out_flat, start, count
    if words is None:
        grid = (-(-count // VALUES),)
        launch("decode_bytes", grid, *arguments, BLOCK_SIZE=q.block_size, NUM_VALUES=VALUES)
    else:
        grid = (-(-len(words) // WORDS),)
        launch("decode_words", grid, *arguments, BLOCK_SIZE=q.block_size, NUM_WORDS=WORDS)


@cache
def load(device: torch.device) -> Decode | None:
    """`decode`, or None where it cannot be built for the device or does not agree."""
    return decode if is_right(agrees_with_reference, device, what="4-bit weights") else None


def implementation(device: torch.device) -> str:
    """The path in use on this device, for reports."""
    return "torch reference" if load(device) is None else "Triton"


def agrees_with_reference(device: torch.device) -> bool:
    """Whether the reference's bits come out of a small random weight, by words and by bytes."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(300 * BLOCK_SIZE + 37, generator=generator)
    # One block of zeros, one huge value: the edges of the format.
    values[64:128], values[200] = 0, 3e4
    return all(_agrees(values, type, device) for type in CODEBOOKS)


def _agrees(values: Tensor, type: str, device: torch.device) -> bool:
    num_blocks, num_bytes = -(-values.numel() // BLOCK_SIZE), (values.numel() + 1) // 2
    codes, scale_N = torch.zeros(num_bytes, dtype=torch.uint8), torch.zeros(num_blocks)
    encode_reference(values, codes, scale_N, type=type, block_size=BLOCK_SIZE, measure=True)
    codes, shape = codes.to(device), tuple(values.shape)
    absmax, nested_absmax, offset = (part.to(device) for part in quantize_scales(scale_N))
    plain = Quantized(codes, scale_N.to(device), None, None, shape, type)
    double = Quantized(codes, absmax, nested_absmax, offset, shape, type)
    for dtype in DTYPES:
        for q, start, count in ((double, 8, 200 * BLOCK_SIZE), (plain, 3, values.numel() - 3)):
            expected, got = torch.zeros(2, count, dtype=dtype, device=device)
            decode_reference(q, expected, start)
            decode(q, got, start)
            if not torch.equal(expected, got):
                return False
    return True


def _words(q: Quantized, start: int, count: int) -> Tensor | None:
    """The codes from value `start` on as int32 (ceil(count / 8),), if whole words hold them."""
    first, stop = start // 2, start // 2 + -(-count // 8) * 4
    is_aligned = start % 8 == 0 and q.codes.storage_offset() % 4 == 0
    return q.codes[first:stop].view(torch.int32) if is_aligned and stop <= len(q.codes) else None


@cache
def _tables(type: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """The 16 values of a type and the 256 of a scale, on the device."""
    return CODEBOOKS[type].to(device), DYNAMIC_MAP.to(device)
