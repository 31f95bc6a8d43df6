"""Weights in 4 bits: codebooks, quantize, dequantize, double quantisation.

A weight is read flat, row by row, and cut into N blocks of Q = `block_size` values. A block
stores its largest magnitude and one 4-bit code per value:

    codes:   [c0 c1] [c2 c3] ...     two codes a byte, the first in the high nibble
    value  = CODEBOOKS[type][code] * absmax[block]                       in float32

With double quantisation the N magnitudes are stored in 8 bits, in blocks of 256:

    absmax = DYNAMIC_MAP[absmax_code] * nested_absmax[block // 256] + offset

Every function here takes tensors on any device. On a CPU the compiled code in `nf4_cpu` does
the work when it is available; the torch code in this file is its reference, bit for bit.

Source:
    Dettmers et al. 2023, QLoRA, arXiv:2305.14314, section 3 and appendix E.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from nibble.errors import ModelError, UsageError
from nibble.kernels import nf4_cpu

BLOCK_SIZE = 64
NESTED_BLOCK_SIZE = 256
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

# Source: arXiv:2305.14314, appendix E, in full float32 precision.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# Sign bit, two exponent bits, one mantissa bit, over the largest value 12; 0.0625 is subnormal.
_FP4_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)

CODEBOOKS: dict[str, Tensor] = {
    "nf4": torch.tensor(_NF4),
    "fp4": torch.tensor(_FP4_MAGNITUDES + tuple(-m for m in _FP4_MAGNITUDES)) / 12,
}
# Codes from the smallest value to the largest; FP4 has two zeros, +0 (code 0) before -0 (code 8).
_ASCENDING: dict[str, tuple[int, ...]] = {
    "nf4": tuple(range(16)),
    "fp4": (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3),
}
# The smallest divisor: a block of zeros is divided by this instead of by zero.
_SMALLEST_ABSMAX = 1e-38
# Values handled at once by the reference: bounds its temporary memory to some 16 MB.
_CHUNK = 1 << 20
_GRID_SIZE = 65536
# Scales tried by the least-squares search, as fractions of the largest magnitude.
_SEARCH_FRACTIONS = tuple(0.60 + 0.025 * step for step in range(17))


def _build_dynamic_map() -> Tensor:
    """The 256 values of the 8-bit dynamic tree type, ascending.

    Seven decades; decade d = -6 ... 0 holds 2^(d+6) magnitudes, the midpoints of equal parts of
    [0.1, 1] * 10^d, each with both signs; then 0 and 1. So 2 * (1 + 2 + ... + 64) + 2 = 256.

    Source:
        Dettmers 2016, arXiv:1511.04561, section 2.2; Dettmers et al. 2022, arXiv:2110.02861.
    """
    magnitudes = []
    for decade in range(-6, 1):
        edges = torch.linspace(0.1, 1.0, 2 ** (decade + 6) + 1)
        magnitudes.append((edges[1:] + edges[:-1]) / 2 * 10.0**decade)
    positive = torch.cat(magnitudes)
    return torch.cat([positive, -positive, torch.tensor([0.0, 1.0])]).sort().values


DYNAMIC_MAP = _build_dynamic_map()


@dataclass(frozen=True, eq=False)
class Quantized:
    """A weight of any shape in 4 bits.

    Shapes:
        codes: (ceil(numel / 2),) uint8. absmax: (N,), N = ceil(numel / block_size); uint8 with
        double quantisation, else float32. nested_absmax: (ceil(N / 256),) float32 and offset:
        (1,) float32, with double quantisation only.

    Args:
        codes: Two codes a byte, the first in the high nibble.
        absmax: One scale per block, or its 8-bit code.
        nested_absmax: One scale per 256 blocks.
        offset: The mean of all absmax, subtracted before they were stored in 8 bits.
        shape: Shape of the weight.
        type: "nf4" or "fp4".
        block_size: Values per block.
    """

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None
    shape: tuple[int, ...]
    type: str = "nf4"
    block_size: int = BLOCK_SIZE

    @property
    def numel(self) -> int:
        """Number of weights."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of everything stored per weight; the 16- and 256-entry tables are shared."""
        parts = (self.codes, self.absmax, self.nested_absmax, self.offset)
        return sum(part.nbytes for part in parts if part is not None)


def implementation(device: torch.device | str = "cpu") -> str:
    """Name of the code that quantises and dequantises on this device, for reports."""
    if torch.device(device).type == "cpu":
        return nf4_cpu.implementation()
    return "torch reference"


def quantize(
    weight: Tensor,
    *,
    type: str = "nf4",
    block_size: int = BLOCK_SIZE,
    double: bool = True,
    search: bool = False,
) -> Quantized:
    """Store a weight in 4 bits.

        absmax_N = max_Q |weight_NQ|;  codes_NQ = nearest code to weight_NQ / absmax_N

    Args:
        weight: Any shape, any floating dtype; read flat in row-major order.
        type: "nf4" or "fp4".
        block_size: Values per block, a power of two from 32 to 4096.
        double: Store the block scales in 8 bits as well.
        search: Choose each block's scale for the least squared error instead of the largest
            magnitude; same format, several times slower.

    Raises:
        UsageError: If `type` or `block_size` is unknown, or the weight is not floating point.
        ModelError: If the weight is empty or holds NaN or an infinite value.
    """
    _check_arguments(weight, type, block_size)
    flat = weight.detach().reshape(-1)
    absmax = torch.empty(-(-flat.numel() // block_size), device=flat.device)
    codes = torch.empty((flat.numel() + 1) // 2, dtype=torch.uint8, device=flat.device)
    for start, stop in _chunks(flat, block_size):
        values = flat[start:stop].float()
        scales = _block_absmax(values, block_size)
        if search:
            scales = _search_scales(values, scales, type, block_size)
        if values.numel() % block_size:
            scales[-1].clamp_(min=_SMALLEST_ABSMAX)
        absmax[start // block_size : -(-stop // block_size)] = scales
        codes[start // 2 : (stop + 1) // 2] = _encode(values, scales, type, block_size)
    if not torch.isfinite(absmax).all():
        raise ModelError(
            f"a weight of shape {tuple(weight.shape)} holds NaN or infinite values",
            fix="download the checkpoint again, or repair the weight",
        )
    nested_absmax = offset = None
    if double:
        absmax, nested_absmax, offset = _quantize_absmax(absmax)
    return Quantized(codes, absmax, nested_absmax, offset, tuple(weight.shape), type, block_size)


def dequantize(
    q: Quantized, *, dtype: torch.dtype = torch.bfloat16, out: Tensor | None = None
) -> Tensor:
    """The weight that `q` stands for: float32 code times float32 scale, rounded once.

    Args:
        dtype: Type of the result.
        out: Contiguous tensor of `q.shape` to write into; its type wins over `dtype`.
    """
    if out is None:
        out = torch.empty(q.shape, dtype=dtype, device=q.codes.device)
    is_done = out.device.type == "cpu" and nf4_cpu.dequantize(
        q.codes, absmax_of(q), out, _table(q), q.block_size
    )
    return out if is_done else dequantize_reference(q, out=out)


def dequantize_reference(q: Quantized, *, out: Tensor) -> Tensor:
    """`dequantize` in plain torch, some million values at a time."""
    absmax, table = absmax_of(q), _table(q).to(out.device)
    flat = out.view(-1)
    step = max(_CHUNK, 2 * q.block_size)
    for start in range(0, q.numel, step):
        stop = min(start + step, q.numel)
        packed = q.codes[start // 2 : (stop + 1) // 2]
        codes = torch.stack([packed >> 4, packed & 15], 1).flatten()[: stop - start]
        scales = absmax[start // q.block_size : -(-stop // q.block_size)]
        scales = scales.repeat_interleave(q.block_size)[: stop - start]
        flat[start:stop] = table[codes.int()] * scales
    return out


def dequantize_slice(
    q: Quantized, index: int, *, dtype: torch.dtype = torch.bfloat16, out: Tensor | None = None
) -> Tensor:
    """Entry `index` of the first dimension alone: one expert of many.

    Raises:
        ModelError: If an entry does not begin at a block.
    """
    size = prod(q.shape[1:])
    if size % q.block_size or size % 2:
        raise ModelError(f"an expert of {size} weights is no multiple of {q.block_size}")
    first, last = index * size // q.block_size, (index + 1) * size // q.block_size
    part = Quantized(
        codes=q.codes[index * size // 2 : (index + 1) * size // 2],
        absmax=absmax_of(q, first, last),
        nested_absmax=None,
        offset=None,
        shape=q.shape[1:],
        type=q.type,
        block_size=q.block_size,
    )
    return dequantize(part, dtype=dtype, out=out)


def absmax_of(q: Quantized, first: int = 0, last: int | None = None) -> Tensor:
    """The float32 scales of blocks first to last, out of their 8-bit codes where they are."""
    codes = q.absmax[first:last]
    if q.nested_absmax is None or q.offset is None:
        return codes
    blocks = torch.arange(first, first + codes.numel(), device=codes.device)
    nested = q.nested_absmax[blocks // NESTED_BLOCK_SIZE]
    return (DYNAMIC_MAP.to(codes.device)[codes.int()] * nested).add_(q.offset)


def _check_arguments(weight: Tensor, type: str, block_size: int) -> None:
    if type not in CODEBOOKS:
        raise UsageError(f"unknown 4-bit type {type!r}, expected nf4 or fp4")
    if block_size not in BLOCK_SIZES:
        raise UsageError(f"block size {block_size} is not one of {BLOCK_SIZES}")
    if not weight.is_floating_point():
        raise UsageError(f"only floating-point weights can be quantised, got {weight.dtype}")
    if weight.numel() == 0:
        raise ModelError(f"a weight of shape {tuple(weight.shape)} is empty")


def _table(q: Quantized) -> Tensor:
    return CODEBOOKS[q.type]


def _chunks(flat: Tensor, block_size: int) -> Iterator[tuple[int, int]]:
    """Ranges of whole blocks that cover `flat`, some million values each."""
    step = max(_CHUNK, 2 * block_size)
    for start in range(0, flat.numel(), step):
        yield start, min(start + step, flat.numel())


def _block_absmax(values: Tensor, block_size: int) -> Tensor:
    """(n,) -> (ceil(n / block_size),); a short last block is filled with zeros."""
    missing = -values.numel() % block_size
    padded = torch.nn.functional.pad(values, (0, missing)) if missing else values
    return padded.view(-1, block_size).abs().amax(1)


def _encode(values: Tensor, absmax: Tensor, type: str, block_size: int) -> Tensor:
    """The packed codes of float32 values: nearest entry of the codebook to value / absmax."""
    if values.device.type == "cpu":
        order = torch.tensor(_ASCENDING[type], dtype=torch.uint8)
        packed = nf4_cpu.encode(values, absmax, block_size, _midpoints(type), order)
        if packed is not None:
            return packed
    return encode_reference(values, absmax, type, block_size)


def encode_reference(values: Tensor, absmax: Tensor, type: str, block_size: int) -> Tensor:
    """`_encode` in plain torch.

    Whole blocks are multiplied by 1 / absmax and a short last one is divided by absmax, and an
    odd last code stands beside that of 0: with these choices the bits are bitsandbytes'.
    """
    num_whole = values.numel() // block_size * block_size
    scales = absmax.clamp(min=_SMALLEST_ABSMAX)
    factors = (1 / scales).repeat_interleave(block_size)[:num_whole]
    normalised = torch.cat([values[:num_whole] * factors, values[num_whole:] / scales[-1]])
    if normalised.numel() % 2:
        normalised = torch.nn.functional.pad(normalised, (0, 1))
    place = torch.bucketize(normalised, _midpoints(type).to(values.device))
    order = torch.tensor(_ASCENDING[type], dtype=torch.uint8, device=values.device)
    codes = order[place]
    return codes[0::2] << 4 | codes[1::2]


def _midpoints(type: str) -> Tensor:
    """The 15 thresholds between neighbouring codes."""
    ascending = CODEBOOKS[type][list(_ASCENDING[type])]
    return (ascending[1:] + ascending[:-1]) / 2


def _quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Double quantisation: 8-bit codes of absmax - mean, their block scales, and the mean."""
    offset = absmax.mean().reshape(1)
    centred = absmax - offset
    nested = _block_absmax(centred, NESTED_BLOCK_SIZE)
    factors = (1 / nested).nan_to_num(posinf=0.0).repeat_interleave(NESTED_BLOCK_SIZE)
    place = (centred * factors[: centred.numel()] + 1) * (_GRID_SIZE - 1) / 2 + 0.5
    codes = _nearest_on_grid().to(absmax.device)[place.int().clamp(0, _GRID_SIZE - 1)]
    return codes.masked_fill_(factors[: centred.numel()] == 0, 0), nested, offset


@functools.cache
def _nearest_on_grid() -> Tensor:
    """The nearest entry of DYNAMIC_MAP to each of 65,536 even steps from -1 to 1.

    bitsandbytes looks 8-bit codes up on this grid; a value within half a step of a threshold
    may so get the neighbouring code.
    """
    grid = torch.arange(_GRID_SIZE, dtype=torch.float32) / (_GRID_SIZE - 1) * 2 - 1
    return torch.bucketize(grid, (DYNAMIC_MAP[1:] + DYNAMIC_MAP[:-1]) / 2).to(torch.uint8)


def _search_scales(values: Tensor, absmax: Tensor, type: str, block_size: int) -> Tensor:
    """Per block, the multiple of absmax whose codes give the least squared error."""
    table = CODEBOOKS[type].to(values.device)
    best_error = torch.full_like(absmax, torch.inf)
    best = absmax.clone()
    order = torch.tensor(_ASCENDING[type], device=values.device)
    for fraction in _SEARCH_FRACTIONS:
        scales = (absmax * fraction).clamp(min=_SMALLEST_ABSMAX)
        wide = scales.repeat_interleave(block_size)[: values.numel()]
        place = torch.bucketize(values / wide, _midpoints(type).to(values.device))
        error = (table[order[place]] * wide - values).square_()
        error = torch.nn.functional.pad(error, (0, -values.numel() % block_size))
        error = error.view(-1, block_size).sum(1)
        is_better = error < best_error
        best_error = torch.where(is_better, error, best_error)
        best = torch.where(is_better, absmax * fraction, best)
    return best
