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
    else:
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
    stored = tl.load(weight.absmax + block, mask=is_asked, other=0)
    if weight.nested is None:
        return stored
    else:  # not to be compiled in the other case
        nested = tl.load(weight.nested + block // _NESTED_BLOCK_SIZE, mask=is_asked, other=0.0)
        return tl.load(weight.map + stored.to(tl.int32)) * nested + tl.load(weight.offset)


# ---- norms ---------------------------------------------------------------------------------------


@triton.jit
def norm(x, weight, rstd, y, eps, sizes, UNIT_OFFSET: tl.constexpr, TILE: tl.constexpr):
    """y = x * rstd, scaled, and rstd = 1 / sqrt(mean(x^2) + eps); some whole rows a program.

    Shapes:
        x, y: (rows, width). weight: (width,). rstd: (rows,) float32. sizes: (rows, width).
        TILE: powers of 2, (rows of a program, at least the width).
    """
    row_R, index_RD, column_D, is_in_RD = _rows_of(sizes, TILE)
    x_RD = tl.load(x + index_RD, mask=is_in_RD, other=0.0).to(tl.float32)
    rstd_R = tl.rsqrt(tl.sum(x_RD * x_RD, 1) / sizes[1] + eps)
    weight_D = tl.load(weight + column_D, mask=column_D < sizes[1], other=0.0).to(tl.float32)
    y_RD = _scaled(x_RD * rstd_R[:, None], weight_D, y.dtype.element_ty, UNIT_OFFSET)
    tl.store(rstd + row_R, rstd_R, mask=row_R < sizes[0])
    tl.store(y + index_RD, y_RD, mask=is_in_RD)


@triton.jit
def norm_again(x, weight, rstd, y, sizes, UNIT_OFFSET: tl.constexpr, TILE: tl.constexpr):
    """y from x and rstd; shapes as in `norm`."""
    row_R, index_RD, column_D, is_in_RD = _rows_of(sizes, TILE)
    x_RD = tl.load(x + index_RD, mask=is_in_RD, other=0.0).to(tl.float32)
    rstd_R = tl.load(rstd + row_R, mask=row_R < sizes[0], other=0.0)
    weight_D = tl.load(weight + column_D, mask=column_D < sizes[1], other=0.0).to(tl.float32)
    y_RD = _scaled(x_RD * rstd_R[:, None], weight_D, y.dtype.element_ty, UNIT_OFFSET)
    tl.store(y + index_RD, y_RD, mask=is_in_RD)


@triton.jit
def norm_gradient(
    x, weight, rstd, grad, grad_x, sizes, UNIT_OFFSET: tl.constexpr, TILE: tl.constexpr
):
    """grad_x = rstd (s - n mean(s n)) with s = grad * scale and n = x * rstd.

    Shapes:
        As in `norm`; grad, grad_x: (rows, width).
    """
    row_R, index_RD, column_D, is_in_RD = _rows_of(sizes, TILE)
    dtype: tl.constexpr = grad_x.dtype.element_ty
    x_RD = tl.load(x + index_RD, mask=is_in_RD, other=0.0).to(tl.float32)
    grad_RD = tl.load(grad + index_RD, mask=is_in_RD, other=0.0).to(tl.float32)
    rstd_R1 = tl.load(rstd + row_R, mask=row_R < sizes[0], other=0.0)[:, None]
    weight_D = tl.load(weight + column_D, mask=column_D < sizes[1], other=0.0).to(tl.float32)
    if UNIT_OFFSET:
        s_RD = grad_RD * (weight_D + 1.0)[None, :]
    else:
        s_RD = _rounded(grad_RD * weight_D[None, :], dtype).to(tl.float32)
    normed_RD = x_RD * rstd_R1
    mean_R1 = (tl.sum(s_RD * normed_RD, 1) / sizes[1])[:, None]
    grad_x_RD = (s_RD - normed_RD * mean_R1) * rstd_R1
    tl.store(grad_x + index_RD, _rounded(grad_x_RD, dtype), mask=is_in_RD)


@triton.jit
def _rows_of(sizes, TILE: tl.constexpr):
    """Numbers of the rows of a program, places of their values, columns, and which exist."""
    row_R = tl.program_id(0).to(tl.int64) * TILE[0] + tl.arange(0, TILE[0])
    column_D = tl.arange(0, TILE[1])
    is_in_RD = (row_R < sizes[0])[:, None] & (column_D < sizes[1])[None, :]
    return row_R, row_R[:, None] * sizes[1] + column_D[None, :], column_D, is_in_RD


@triton.jit
def _scaled(normed_RD, weight_D, dtype: tl.constexpr, UNIT_OFFSET: tl.constexpr):
    """With an offset in float32, else after rounding."""
    if UNIT_OFFSET:
        scaled_RD = normed_RD * (weight_D + 1.0)[None, :]
    else:
        scaled_RD = _rounded(normed_RD, dtype).to(tl.float32) * weight_D[None, :]
    return _rounded(scaled_RD, dtype)


# ---- gated units ---------------------------------------------------------------------------------


@triton.jit
def gated(gate, up, y, sizes, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """y = act(gate) * up; a program takes a block of columns of a row.

    Shapes:
        gate, up: rows of `width` values that begin `stride` apart. y: (rows, width).
        sizes: (width, stride).
    """
    place_F, dense_F, is_in_F = _block_of_row(sizes, BLOCK)
    dtype: tl.constexpr = y.dtype.element_ty
    gate_F = tl.load(gate + place_F, mask=is_in_F, other=0.0).to(tl.float32)
    up_F = tl.load(up + place_F, mask=is_in_F, other=0.0).to(tl.float32)
    activated_F = _rounded(_activated(gate_F, ACTIVATION)[0], dtype).to(tl.float32)
    tl.store(y + dense_F, _rounded(activated_F * up_F, dtype), mask=is_in_F)


@triton.jit
def gated_gradient(
    gate, up, grad, grad_gate, grad_up, sizes, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):
    """grad_gate = grad * up * act'(gate), grad_up = grad * act(gate); shapes as in `gated`."""
    place_F, dense_F, is_in_F = _block_of_row(sizes, BLOCK)
    dtype: tl.constexpr = grad_gate.dtype.element_ty
    gate_F = tl.load(gate + place_F, mask=is_in_F, other=0.0).to(tl.float32)
    up_F = tl.load(up + place_F, mask=is_in_F, other=0.0).to(tl.float32)
    grad_F = tl.load(grad + dense_F, mask=is_in_F, other=0.0).to(tl.float32)
    activated_F, slope_F = _activated(gate_F, ACTIVATION)
    activated_F = _rounded(activated_F, dtype).to(tl.float32)
    grad_activated_F = _rounded(grad_F * up_F, dtype).to(tl.float32)
    tl.store(grad_gate + dense_F, _rounded(grad_activated_F * slope_F, dtype), mask=is_in_F)
    tl.store(grad_up + dense_F, _rounded(activated_F * grad_F, dtype), mask=is_in_F)


@triton.jit
def _block_of_row(sizes, BLOCK: tl.constexpr):
    """Places of the values of a program where rows are apart and where they are dense."""
    row = tl.program_id(0).to(tl.int64)
    column_F = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    return row * sizes[1] + column_F, row * sizes[0] + column_F, column_F < sizes[0]


@triton.jit
def _activated(x, ACTIVATION: tl.constexpr):
    """act(x) and its derivative. Both are x sigmoid(z): (1 + tanh(u)) / 2 = sigmoid(2u)."""
    if ACTIVATION == "silu":
        sigmoid = tl.sigmoid(x)
        rise = 1.0
    else:
        square = x * x
        sigmoid = tl.sigmoid(x * _ROOT * (square * _CUBIC + 1.0))
        rise = (square * (3.0 * _CUBIC) + 1.0) * _ROOT
    return x * sigmoid, sigmoid + x * sigmoid * (1.0 - sigmoid) * rise


# ---- rotations -----------------------------------------------------------------------------------


@triton.jit
def rotate(x, cos, sin, y, sizes, strides, BACK: tl.constexpr, TILE: tl.constexpr):
    """y1 = x1 cos - x2 sin, y2 = x2 cos + x1 sin for the halves of each head, or back.

    A program takes a token and some heads.

    Shapes:
        x, y: (heads, tokens, width), their first two strides in `strides`. cos, sin: (tokens,
        turned). sizes: (heads, width, turned). TILE: powers of 2, (heads of a program, at least
        half the turned part, at least what is behind it or 0).
    """
    token = tl.program_id(0).to(tl.int64)
    head_H = tl.program_id(1) * TILE[0] + tl.arange(0, TILE[0])
    from_H = x + token * strides[1] + head_H[:, None].to(tl.int64) * strides[0]
    to_H = y + token * strides[3] + head_H[:, None].to(tl.int64) * strides[2]
    is_head_H = (head_H < sizes[0])[:, None]
    dtype: tl.constexpr = y.dtype.element_ty
    half = sizes[2] // 2
    first_K = tl.arange(0, TILE[1])[None, :]
    second_K = first_K + half
    is_in_HK = is_head_H & (first_K < half)
    x1_HK = tl.load(from_H + first_K, mask=is_in_HK, other=0.0).to(tl.float32)
    x2_HK = tl.load(from_H + second_K, mask=is_in_HK, other=0.0).to(tl.float32)
    angle = token * sizes[2]
    cos1_K = tl.load(cos + angle + first_K, mask=first_K < half, other=0.0).to(tl.float32)
    cos2_K = tl.load(cos + angle + second_K, mask=first_K < half, other=0.0).to(tl.float32)
    sin1_K = tl.load(sin + angle + first_K, mask=first_K < half, other=0.0).to(tl.float32)
    sin2_K = tl.load(sin + angle + second_K, mask=first_K < half, other=0.0).to(tl.float32)
    # Forward the sines belong to where a value goes, backward to where it came from.
    if BACK:
        turn1_HK = x2_HK * sin2_K
        turn2_HK = -(x1_HK * sin1_K)
    else:
        turn1_HK = -(x2_HK * sin1_K)
        turn2_HK = x1_HK * sin2_K
    y1_HK = _sum_of_rounded(x1_HK * cos1_K, turn1_HK, dtype)
    y2_HK = _sum_of_rounded(x2_HK * cos2_K, turn2_HK, dtype)
    tl.store(to_H + first_K, y1_HK, mask=is_in_HK)
    tl.store(to_H + second_K, y2_HK, mask=is_in_HK)
    if TILE[2] > 0:
        rest_K = sizes[2] + tl.arange(0, TILE[2])[None, :]
        is_rest_HK = is_head_H & (rest_K < sizes[1])
        tl.store(to_H + rest_K, tl.load(from_H + rest_K, mask=is_rest_HK), mask=is_rest_HK)


@triton.jit
def _sum_of_rounded(a, b, dtype: tl.constexpr):
    total = _rounded(a, dtype).to(tl.float32) + _rounded(b, dtype).to(tl.float32)
    return _rounded(total, dtype)


# ---- the head ------------------------------------------------------------------------------------


@triton.jit
def head(raw, labels, losses, width, scale, softcap, BLOCK: tl.constexpr):
    """Raw logits become the gradients of their cross-entropy; a program takes a row.

    The row is read twice: for its largest logit and the sum of exponentials, then for the gradient.

    Shapes:
        raw: (rows, width). labels: (rows,) int64. losses: (rows,) float32.
    """
    row = tl.program_id(0).to(tl.int64)
    raw += row * width
    dtype: tl.constexpr = raw.dtype.element_ty
    label = tl.load(labels + row)
    target = _shaped(tl.load(raw + label).to(tl.float32), scale, softcap)[0]
    highest_V = tl.full((BLOCK,), _LOWEST, tl.float32)
    total_V = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, width, BLOCK):
        column_V = first + tl.arange(0, BLOCK)
        is_in_V = column_V < width
        logit_V = _shaped(_wide(raw + column_V, is_in_V), scale, softcap)[0]
        logit_V = tl.where(is_in_V, logit_V, _LOWEST)
        higher_V = tl.maximum(highest_V, logit_V)
        total_V = total_V * tl.exp(highest_V - higher_V) + tl.exp(logit_V - higher_V)
        highest_V = higher_V
    highest = tl.max(highest_V, 0)
    total = tl.sum(total_V * tl.exp(highest_V - highest), 0)
    tl.store(losses + row, highest + tl.log(total) - target)
    for first in range(0, width, BLOCK):
        column_V = first + tl.arange(0, BLOCK)
        is_in_V = column_V < width
        logit_V, slope_V = _shaped(_wide(raw + column_V, is_in_V), scale, softcap)
        probability_V = tl.exp(logit_V - highest) / total
        grad_V = tl.where(column_V == label, probability_V - 1.0, probability_V) * slope_V
        tl.store(raw + column_V, _rounded(grad_V, dtype), mask=is_in_V)


@triton.jit
def _wide(pointers, is_in):
    return tl.load(pointers, mask=is_in, other=0.0).to(tl.float32)


@triton.jit
def _shaped(raw, scale, softcap):
    """A logit of the raw product, and its derivative."""
    if softcap is None:
        return raw * scale, scale
    else:
        tangent = 2.0 * tl.sigmoid(2.0 * raw * scale / softcap) - 1.0
        return softcap * tangent, (1.0 - tangent * tangent) * scale
