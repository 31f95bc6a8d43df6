"""The 4-bit format and its reference: codebooks, blocks, double quantisation in plain torch.

A weight is read flat, row by row, and cut into N blocks of Q = `block_size` values. A block
stores its largest magnitude and one 4-bit code per value:

    codes:   [c0 c1] [c2 c3] ...     two codes a byte, the first in the high nibble
    value  = CODEBOOKS[type][code] * absmax[block]                       in float32

With double quantisation the N magnitudes are stored in 8 bits, in blocks of 256:

    absmax = DYNAMIC_MAP[absmax_code] * nested_absmax[block // 256] + offset

Tensors may be on any device. `nf4` is the door: it checks arguments and picks the fast code where
there is one, which gives the same bits as the functions here.

Source:
    Dettmers et al. 2023, QLoRA, arXiv:2305.14314, section 3 and appendix E.
"""

from dataclasses import dataclass
from functools import cache
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from nibble.errors import ModelError

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
ASCENDING: dict[str, tuple[int, ...]] = {
    "nf4": tuple(range(16)),
    "fp4": (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3),
}
# The smallest divisor: a block of zeros is divided by this instead of by zero.
SMALLEST_ABSMAX = 1e-38
# Values handled at once by the reference: bounds its temporary memory to some 16 MB.
CHUNK = 1 << 20
_GRID_SIZE = 65536


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
        absmax: One scale per block, or its 8-bit code; searched scales may be negative.
        nested_absmax: One scale per 256 blocks.
        offset: The mean of all absmax, subtracted before they were stored in 8 bits.
        shape: Shape of the weight.
        type: "nf4" or "fp4".
        block_size: Values per block.

    Raises:
        ModelError: If a part has another dtype or length than the shape asks for.
    """

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None
    shape: tuple[int, ...]
    type: str = "nf4"
    block_size: int = BLOCK_SIZE

    def __post_init__(self) -> None:
        has_nested = self.nested_absmax is not None and self.offset is not None
        num_blocks = -(-self.numel // self.block_size)
        expected = {"codes": (torch.uint8, (self.numel + 1) // 2)}
        expected["absmax"] = (torch.uint8 if has_nested else torch.float32, num_blocks)
        if has_nested:
            num_nested = -(-num_blocks // NESTED_BLOCK_SIZE)
            expected |= {"nested_absmax": (torch.float32, num_nested), "offset": (torch.float32, 1)}
        for name, (dtype, length) in expected.items():
            part: Tensor = getattr(self, name)
            if part.dtype != dtype or part.shape != (length,) or not part.is_contiguous():
                raise ModelError(
                    f"{name} of a 4-bit weight of shape {self.shape} is {part.dtype} of shape "
                    f"{tuple(part.shape)}; expected {dtype} of shape {(length,)}",
                    fix="keep stored weights as they are: no .to(dtype), no missing bytes",
                )

    @property
    def numel(self) -> int:
        """Number of weights."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of everything stored per weight; the 16- and 256-entry tables are shared."""
        parts = (self.codes, self.absmax, self.nested_absmax, self.offset)
        return sum(part.nbytes for part in parts if part is not None)


def bounds(type: str) -> Tensor:
    """The 15 midpoints between neighbouring codebook values, ascending."""
    ascending = CODEBOOKS[type][list(ASCENDING[type])]
    return (ascending[1:] + ascending[:-1]) / 2


def encode_reference(
    values: Tensor,
    codes: Tensor,
    scale_N: Tensor,
    *,
    type: str,
    block_size: int,
    measure: bool,
) -> None:
    """Write the codes of `values`; with `measure` first write each block's absmax to `scale_N`.

    Scales that were measured are positive; given ones may be negative.

    A full block is multiplied by 1 / absmax, a last and shorter block is divided by absmax: the
    two round differently, and weights stored by other programs are made so. A value on a bound
    takes the lower code.

    Shapes:
        values: 1-D. codes: (ceil(numel / 2),) uint8. scale_N: (ceil(numel / block_size),).
    """
    values = values.float()
    num_full = values.numel() // block_size
    value_NQ = values[: num_full * block_size].view(num_full, block_size)
    rest = values[num_full * block_size :]
    if measure:
        scale_N[:num_full] = value_NQ.abs().amax(-1)
        if rest.numel():
            scale_N[num_full:] = rest.abs().amax().clamp(min=SMALLEST_ABSMAX)
    divisor_N = scale_N.clamp(min=SMALLEST_ABSMAX)
    divisor_N = divisor_N.where(~(scale_N < 0), scale_N.clamp(max=-SMALLEST_ABSMAX))
    # An odd number of values leaves one nibble, which takes the code of zero.
    scaled = torch.zeros(codes.numel() * 2, device=values.device)
    scaled_NQ = scaled[: num_full * block_size].view(num_full, block_size)
    torch.mul(value_NQ, (1.0 / divisor_N[:num_full])[:, None], out=scaled_NQ)
    scaled[num_full * block_size : values.numel()] = rest / divisor_N[num_full:]
    rank = torch.bucketize(scaled, bounds(type).to(values.device), out_int32=True)
    code = torch.tensor(ASCENDING[type], dtype=torch.uint8, device=values.device)[rank]
    torch.bitwise_or(code[0::2] << 4, code[1::2], out=codes)


def decode_reference(q: Quantized, out_flat: Tensor, start: int) -> None:
    """Write the values from number `start` on into `out_flat` (1-D, any floating dtype)."""
    codebook = CODEBOOKS[q.type].to(q.codes.device)
    for first in range(start, start + out_flat.numel(), CHUNK):
        stop = min(first + CHUNK, start + out_flat.numel())
        byte = q.codes[first // 2 : (stop + 1) // 2]
        code = torch.stack([byte >> 4, byte & 15], dim=1).view(-1)[first % 2 :][: stop - first]
        block, last = first // q.block_size, -(-stop // q.block_size)
        scale = dequantize_scales(q, block, last).repeat_interleave(q.block_size)
        scale = scale[first - block * q.block_size :][: stop - first]
        out_flat[first - start : stop - start] = codebook[code.int()] * scale


def quantize_scales(scale_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Block scales in 8 bits: (codes (N,) uint8, nested_absmax (ceil(N / 256),), offset (1,)).

    A scaled value v in [-1, 1] goes through step int((v + 1) * 32767.5 + 0.5) of 65536 to its code.
    """
    device = scale_N.device
    offset = scale_N.mean().view(1)
    code_of_step = _code_of_step().to(device)
    codes = torch.empty(scale_N.numel(), dtype=torch.uint8, device=device)
    nested_absmax = torch.empty(-(-scale_N.numel() // NESTED_BLOCK_SIZE), device=device)
    for first in range(0, scale_N.numel(), CHUNK):
        part = scale_N[first : first + CHUNK] - offset
        part_NQ = F.pad(part, (0, -part.numel() % NESTED_BLOCK_SIZE)).view(-1, NESTED_BLOCK_SIZE)
        absmax_N1 = part_NQ.abs().amax(-1, keepdim=True)
        # 1 / 0 and 1 / subnormal are infinite; 0 times that is NaN and counts as -1.
        scaled_NQ = (part_NQ * (1.0 / absmax_N1)).nan_to_num_(nan=-1.0).clamp_(-1, 1)
        step_NQ = scaled_NQ.add_(1).mul_(32767.5).add_(0.5).int()
        block = first // NESTED_BLOCK_SIZE
        nested_absmax[block : block + len(absmax_N1)] = absmax_N1[:, 0]
        codes[first : first + part.numel()] = code_of_step[step_NQ].view(-1)[: part.numel()]
    return codes, nested_absmax, offset


@cache
def _code_of_step() -> Tensor:
    """The code nearest to each of 65536 equal steps from -1 to 1.

    Step 32768 is where v = 0 goes; it stands for 1.5e-5 and so has code 130, not 127.
    """
    step = torch.arange(65536) / 32767.5 - 1
    midpoints = (DYNAMIC_MAP[1:] + DYNAMIC_MAP[:-1]) / 2
    return torch.bucketize(step, midpoints).to(torch.uint8)


def dequantize_scales(q: Quantized, first: int = 0, last: int | None = None) -> Tensor:
    """The float32 scales of blocks `first` to `last`; product and sum are rounded one by one."""
    if q.nested_absmax is None or q.offset is None:
        return q.absmax[first:last]
    code_N = q.absmax[first:last].int()
    block_N = torch.arange(first, first + code_N.numel(), device=code_N.device)
    nested_N = q.nested_absmax[block_N // NESTED_BLOCK_SIZE]
    return (DYNAMIC_MAP.to(code_N.device)[code_N] * nested_N).add_(q.offset)
