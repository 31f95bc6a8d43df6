"""The code that runs on a GPU, in Triton. To be imported only where Triton is installed.

`nf4_triton` and `layers_triton` launch it. Names of tensors end in the letters of their
dimensions, as everywhere; names without are pointers and numbers. Arithmetic is in float32, and a
product and a sum are rounded one by one (`triton_support.launch` says so to the compiler).
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton import knobs

# The interpreter cuts float32 to bfloat16 instead of rounding it.
_IS_INTERPRETED = tl.constexpr(knobs.runtime.interpret)
_NESTED_BLOCK_SIZE = tl.constexpr(256)
_ROOT = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
_CUBIC = tl.constexpr(0.044715)
_LOWEST = tl.constexpr(-3.4028234663852886e38)


class Weight(NamedTuple):
    """Pointers to the parts of a stored weight; `nested` and `offset` are None without them."""

    codes: Any
    codebook: Any
    absmax: Any
    map: Any
    nested: Any
    offset: Any


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    """Float32 -> dtype, to nearest, ties to even."""
    if _IS_INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        nearest = tl.where(x == x, nearest, 0x7FC0)
        return nearest.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


# ---- 4-bit weights -------------------------------------------------------------------------------


@triton.jit
def decode_words(weight, out, start, count, BLOCK_SIZE: tl.constexpr, NUM_WORDS: tl.constexpr):
    """Values `start` to `start + count`, from whole words of 8 codes.

    A thread reads one word and writes its 8 values in one go; they share a scale.

    Shapes:
        codes: (ceil(count / 8),) int32, from value `start` on. out: (count,).
    """
    word_W = tl.program_id(0).to(tl.int64) * NUM_WORDS + tl.arange(0, NUM_WORDS)
    is_asked_W = word_W * 8 < count
    codes_W = tl.load(weight.codes + word_W, mask=is_asked_W, other=0)
    scale_W = _scales(weight, (start + word_W * 8) // BLOCK_SIZE, is_asked_W)
    place_E = tl.arange(0, 8)
    # The first of two codes lies in the high half of its byte.
    code_WE = (codes_W[:, None] >> ((place_E ^ 1) * 4)[None, :]) & 15
    value_WE = tl.load(weight.codebook + code_WE) * scale_W[:, None]
    index_WE = word_W[:, None] * 8 + place_E[None, :]
    tl.store(out + index_WE, _rounded(value_WE, out.dtype.element_ty), mask=index_WE < count)


@triton.jit
def decode_bytes(weight, out, start, count, BLOCK_SIZE: tl.constexpr, NUM_VALUES: tl.constexpr):
    """The same one value a thread, wherever it lies; slower.

    Shapes:
        codes: (ceil(numel / 2),) uint8, from the first value of the weight on. out: (count,).
    """
    index_V = tl.program_id(0).to(tl.int64) * NUM_VALUES + tl.arange(0, NUM_VALUES)
    is_asked_V = index_V < count
    value_V = start + index_V
    byte_V = tl.load(weight.codes + value_V // 2, mask=is_asked_V, other=0).to(tl.int32)
    code_V = tl.where(value_V % 2 == 0, byte_V >> 4, byte_V & 15)
    scale_V = _scales(weight, value_V // BLOCK_SIZE, is_asked_V)
    decoded_V = tl.load(weight.codebook + code_V) * scale_V
    tl.store(out + index_V, _rounded(decoded_V, out.dtype.element_ty), mask=is_asked_V)


@triton.jit
def _scales(weight, block, is_asked):
    """The float32 scales of some blocks."""
    if weight.nested is None:
        return tl.load(weight.absmax + block, mask=is_asked, other=0.0)
    code = tl.load(weight.absmax + block, mask=is_asked, other=0).to(tl.int32)
    nested = tl.load(weight.nested + block // _NESTED_BLOCK_SIZE, mask=is_asked, other=0.0)
    return tl.load(weight.map + code) * nested + tl.load(weight.offset)
