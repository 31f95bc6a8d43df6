"""Weights in 4 bits: quantize, dequantize. The format itself stands in `nf4_reference`.

On a CPU the compiled code of `nf4_cpu` does the work where it can be built, and on a CUDA device
the Triton code of `nf4_triton` dequantizes; elsewhere, and as the oracle of every test, the plain
torch code of `nf4_reference` does. All give the same bits.

Source:
    Dettmers et al. 2023, QLoRA, arXiv:2305.14314, section 3 and appendix E.
"""

from collections.abc import Callable, Iterator, Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from nibble.errors import ModelError, UsageError
from nibble.kernels import nf4_cpu, nf4_triton
from nibble.kernels.nf4_reference import (
    BLOCK_SIZE,
    BLOCK_SIZES,
    CHUNK,
    CODEBOOKS,
    DYNAMIC_MAP,
    NESTED_BLOCK_SIZE,
    Quantized,
    decode_reference,
    dequantize_scales,
    encode_reference,
    quantize_scales,
)
from nibble.kernels.nf4_search import search_reference
from nibble.kernels.target import is_fake, report_kernel

__all__ = [
    "BLOCK_SIZE",
    "BLOCK_SIZES",
    "CODEBOOKS",
    "DYNAMIC_MAP",
    "NESTED_BLOCK_SIZE",
    "Quantized",
    "dequantize",
    "dequantize_reference",
    "dequantize_slice",
    "implementation",
    "quantize",
    "quantize_parts",
]


def implementation(device: torch.device | str = "cpu") -> str:
    """Name of the code that quantises and dequantises on this device, for reports."""
    device = torch.device(device)
    return nf4_cpu.implementation() if device.type == "cpu" else nf4_triton.implementation(device)


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
        search: Choose each block's scale, which may then be negative, for the least squared
            error: see `nf4_search`. Never worse in sum over the weight, and the same format.

    Raises:
        UsageError: If `type` or `block_size` is unknown, or the weight is not floating point.
        ModelError: If the weight is empty or holds NaN or infinite values.
    """
    return quantize_parts(
        [lambda: weight],
        tuple(weight.shape),
        type=type,
        block_size=block_size,
        double=double,
        search=search,
    )


def quantize_parts(
    parts: Sequence[Callable[[], Tensor]],
    shape: tuple[int, ...],
    *,
    type: str = "nf4",
    block_size: int = BLOCK_SIZE,
    double: bool = True,
    search: bool = False,
) -> Quantized:
    """`quantize` for a weight that is never whole in memory: equal parts of it, one at a time.

    Args:
        parts: Functions that give the parts of the flat weight in order; with `search` each is
            called two or three times. Part boundaries are block boundaries.
        shape: Shape of the whole weight.

    Raises:
        UsageError: As `quantize`; also if the parts do not divide the weight at block boundaries.
        ModelError: As `quantize`.
    """
    size = prod(shape) // len(parts)
    if size * len(parts) != prod(shape) or (len(parts) > 1 and size % block_size):
        raise UsageError(f"{len(parts)} parts of {shape} do not end at blocks of {block_size}")
    first = parts[0]()
    _check_arguments(first, type, block_size)
    scale_N = torch.empty(-(-prod(shape) // block_size), device=first.device)
    codes = torch.empty((prod(shape) + 1) // 2, dtype=torch.uint8, device=first.device)
    if is_fake(first):
        absmax, nested_absmax, offset = _empty_scales(scale_N) if double else (scale_N, None, None)
        return Quantized(codes, absmax, nested_absmax, offset, shape, type, block_size)
    spans = [
        (
            codes[at // 2 : (at + size + 1) // 2],
            slice(at // block_size, -(-(at + size) // block_size)),
        )
        for at in range(0, prod(shape), size)
    ]
    found_N = torch.empty_like(scale_N) if search else scale_N
    for read, (part_codes, block) in zip([lambda: first, *parts[1:]], spans, strict=True):
        flat = read().detach().reshape(-1)
        _encode(flat, part_codes, scale_N[block], type=type, block_size=block_size)
        if not torch.isfinite(scale_N[block]).all():
            raise ModelError(
                f"a weight of shape {shape} holds NaN or infinite values",
                fix="download the checkpoint again, or repair the weight",
            )
        if search:
            _search(flat, scale_N[block], found_N[block], type=type, block_size=block_size)
    q = Quantized(codes, *_store_scales(scale_N, double), shape, type, block_size)
    if not search:
        return q
    found = Quantized(codes, *_store_scales(found_N, double), shape, type, block_size)
    if _recode(parts, q, found):
        return found
    for read, (part_codes, block) in zip(parts, spans, strict=True):
        flat = read().detach().reshape(-1)
        _encode(flat, part_codes, scale_N[block], type=type, block_size=block_size)
    return q


def dequantize(
    q: Quantized,
    *,
    dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
    start: int = 0,
    count: int | None = None,
) -> Tensor:
    """Give the weight back: code * absmax in float32, rounded once to `dtype`.

    Args:
        q: The stored weight.
        dtype: float32, bfloat16 or float16.
        out: A contiguous tensor of this dtype and number of values to write into.
        start: First value, counted flat over the weight.
        count: Number of values; None takes all that follow.

    Returns:
        The weight in its shape; a part of it as a 1-D tensor. A view of `out` if given.

    Raises:
        UsageError: If the range lies outside the weight, or `out` or `dtype` does not fit.
    """
    out_flat, shape = _prepare_out(q, dtype=dtype, out=out, start=start, count=count)
    if is_fake(out_flat):
        num_parts = q.numel // out_flat.numel()
        report_kernel("decode", 0, out_flat.nbytes + q.nbytes // num_parts, num_parts)
        return out_flat.view(shape)
    _decoder(q.codes, out_flat)(q, out_flat, start)
    return out_flat.view(shape)


def dequantize_slice(
    q: Quantized,
    index: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
) -> Tensor:
    """One entry of the first dimension, such as one expert of (E, O, I): `weight[index]`."""
    if not 0 <= index < q.shape[0]:
        raise UsageError(f"index {index} is outside the first dimension of {q.shape}")
    count = prod(q.shape[1:])
    flat = dequantize(q, dtype=dtype, out=out, start=index * count, count=count)
    return flat.view(q.shape[1:])


def dequantize_reference(
    q: Quantized,
    *,
    dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
    start: int = 0,
    count: int | None = None,
) -> Tensor:
    """`dequantize` in plain torch, on any device."""
    out_flat, shape = _prepare_out(q, dtype=dtype, out=out, start=start, count=count)
    decode_reference(q, out_flat, start)
    return out_flat.view(shape)


def _check_arguments(weight: Tensor, type: str, block_size: int) -> None:
    if type not in CODEBOOKS:
        raise UsageError(f'quant.type is "{type}"; expected one of {sorted(CODEBOOKS)}')
    if block_size not in BLOCK_SIZES:
        raise UsageError(f"quant.block_size is {block_size}; expected one of {BLOCK_SIZES}")
    if not weight.is_floating_point():
        raise UsageError(f"a weight of dtype {weight.dtype} cannot be quantised; expected floats")
    if weight.numel() == 0:
        raise ModelError(f"a weight of shape {tuple(weight.shape)} is empty")


def _prepare_out(
    q: Quantized, *, dtype: torch.dtype, out: Tensor | None, start: int, count: int | None
) -> tuple[Tensor, tuple[int, ...]]:
    """The flat tensor to write into, and the shape of the answer."""
    count = q.numel - start if count is None else count
    if start < 0 or count < 0 or start + count > q.numel:
        raise UsageError(f"values {start} to {start + count} lie outside a weight of {q.numel}")
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UsageError(f"cannot dequantise to {dtype}; expected float32, bfloat16 or float16")
    if out is None:
        out = torch.empty(count, dtype=dtype, device=q.codes.device)
    if out.dtype != dtype or out.numel() != count or not out.is_contiguous():
        raise UsageError(
            f"`out` is {out.dtype} of shape {tuple(out.shape)}; "
            f"expected {count} contiguous values of {dtype}"
        )
    return out.view(-1), q.shape if count == q.numel else (count,)


def _encode(
    flat: Tensor,
    codes: Tensor,
    scale_N: Tensor,
    *,
    type: str,
    block_size: int,
    measure: bool = True,
) -> None:
    """`encode_reference`, by the fastest code and with little temporary memory."""
    library = _library(flat, codes)
    encode = encode_reference if library is None else library.encode
    for first, values in _pieces(flat, library):
        stop = first + values.numel()
        encode(
            values,
            codes[first // 2 : (stop + 1) // 2],
            scale_N[first // block_size : -(-stop // block_size)],
            type=type,
            block_size=block_size,
            measure=measure,
        )


def _search(flat: Tensor, absmax_N: Tensor, scale_N: Tensor, *, type: str, block_size: int) -> None:
    """`search_reference`, by the fastest code and with little temporary memory."""
    library = _library(flat)
    search = search_reference if library is None else library.search
    for first, values in _pieces(flat, library):
        block = slice(first // block_size, -(-(first + values.numel()) // block_size))
        search(values, absmax_N[block], scale_N[block], type=type, block_size=block_size)


def _pieces(flat: Tensor, library: nf4_cpu.Library | None) -> Iterator[tuple[int, Tensor]]:
    """The weight as the library takes it, or in chunks of float32; each with its first value."""
    is_direct = library is not None and flat.dtype in (torch.float32, torch.bfloat16)
    if is_direct:
        yield 0, flat
        return
    for first in range(0, flat.numel(), CHUNK):
        yield first, flat[first : first + CHUNK].float()


def _recode(parts: Sequence[Callable[[], Tensor]], q: Quantized, found: Quantized) -> bool:
    """Write the codes that are nearest at the scales of `found`, and whether it is closer than `q`.

    Both share their codes. Scales are taken as they are stored, in 8 bits or not.
    """
    gain_N = torch.empty(-(-q.numel // q.block_size), dtype=torch.float64, device=q.codes.device)
    first = 0
    for read in parts:
        for values in read().detach().reshape(-1).split(CHUNK):
            stop = first + values.numel()
            block, last = first // q.block_size, -(-stop // q.block_size)
            gain_N[block:last] = _squared_errors(values, q, first)
            _encode(
                values,
                q.codes[first // 2 : (stop + 1) // 2],
                dequantize_scales(found, block, last),
                type=q.type,
                block_size=q.block_size,
                measure=False,
            )
            gain_N[block:last] -= _squared_errors(values, found, first)
            first = stop
    # numpy adds in one order on any number of threads.
    return bool(gain_N.cpu().numpy().sum() > 0)


def _squared_errors(values: Tensor, q: Quantized, first: int) -> Tensor:
    """Of each block of the values from number `first` on: (ceil(numel / block_size),) float64."""
    stored = dequantize(q, dtype=torch.float32, start=first, count=values.numel())
    rest = F.pad(stored.view(-1).sub_(values), (0, -values.numel() % q.block_size))
    return rest.view(-1, q.block_size).double().square_().sum(-1)


def _store_scales(scale_N: Tensor, double: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """absmax, nested_absmax and offset of `Quantized`."""
    return quantize_scales(scale_N) if double else (scale_N, None, None)


def _empty_scales(scale_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The parts that `quantize_scales` gives, without values."""
    num_nested = -(-scale_N.numel() // NESTED_BLOCK_SIZE)
    absmax = torch.empty_like(scale_N, dtype=torch.uint8)
    return absmax, scale_N.new_empty(num_nested), scale_N.new_empty(1)


def _decoder(*parts: Tensor) -> nf4_triton.Decode:
    """The fastest code that decodes into such parts."""
    if _are_plain(parts, "cuda"):
        return nf4_triton.load(parts[0].device) or decode_reference
    library = _library(*parts)
    return decode_reference if library is None else library.decode


def _library(*parts: Tensor) -> nf4_cpu.Library | None:
    """The compiled code if all parts are plain memory of a CPU."""
    return nf4_cpu.load() if _are_plain(parts, "cpu") else None


def _are_plain(parts: Sequence[Tensor], type_: str) -> bool:
    return all(type(t) in (Tensor, Parameter) and t.device.type == type_ for t in parts)
