"""The compiled 4-bit code for CPUs; `compiled` builds it. Same bits as `nf4_reference`."""

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from nibble.kernels.compiled import in_parts, load_compiled
from nibble.kernels.nf4_reference import (
    ASCENDING,
    CODEBOOKS,
    DYNAMIC_MAP,
    Quantized,
    bounds,
    decode_reference,
    encode_reference,
    quantize_scales,
)
from nibble.kernels.nf4_search import (
    FACTORS,
    LARGEST,
    LEAST_GAIN,
    NUM_REFITS,
    SMALLEST,
    levels,
    search_reference,
)

SOURCE = Path(__file__).with_name("nf4_cpu.c")
# Product and sum of a nested scale are rounded one by one.
FLAGS = ("-ffp-contract=off",)
# Work below this many values is done by the calling thread alone.
VALUES_PER_THREAD = 1 << 18
SEARCHED_PER_THREAD = 1 << 13

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class CWeight(ctypes.Structure):
    """`Weight` of nf4_weight.h."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("codebook", ctypes.c_void_p),
        ("absmax", ctypes.c_void_p),
        ("map", ctypes.c_void_p),
        ("nested", ctypes.c_void_p),
        ("offset", ctypes.c_void_p),
        ("block_size", ctypes.c_int64),
    )


def c_weight(q: Quantized) -> CWeight:
    """Addresses of the parts of a stored weight, valid while it is there."""
    parts = q.codes, CODEBOOKS[q.type], q.absmax, DYNAMIC_MAP, q.nested_absmax, q.offset
    addresses = [None if part is None else part.data_ptr() for part in parts]
    return CWeight(*addresses, q.block_size)


class _Search(ctypes.Structure):
    """`Search` of nf4_cpu.c."""

    _fields_ = (
        ("bounds", ctypes.c_void_p),
        ("levels", ctypes.c_void_p),
        ("factors", ctypes.c_void_p),
        ("num_factors", ctypes.c_int64),
        ("num_refits", ctypes.c_int64),
        ("smallest", ctypes.c_float),
        ("largest", ctypes.c_float),
        ("least_gain", ctypes.c_float),
    )


class Library:
    """The three operations of the compiled code; same signatures as the reference.

    Large work is split over `torch.get_num_threads()` threads; the result does not depend on it.

    Args:
        path: The shared library.

    Raises:
        OSError: If it cannot be loaded.
    """

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        pointer, int64, int32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        library.nibble_instructions.restype = ctypes.c_char_p
        library.nibble_decode.argtypes = [pointer, int64, int64, pointer, int32]
        library.nibble_decode.restype = None
        library.nibble_encode.argtypes = [
            *(pointer, int32, int64, int64),
            *(pointer, pointer, int32, pointer, pointer),
        ]
        library.nibble_encode.restype = None
        library.nibble_search.argtypes = [pointer, pointer, int32, int64, int64, pointer, pointer]
        library.nibble_search.restype = None
        self._library = library
        self.instructions: str = library.nibble_instructions().decode()

    def encode(
        self,
        values: Tensor,
        codes: Tensor,
        scale_N: Tensor,
        *,
        type: str,
        block_size: int,
        measure: bool,
    ) -> None:
        """As `encode_reference`, for float32 and bfloat16."""
        bound, order = bounds(type), torch.tensor(ASCENDING[type], dtype=torch.uint8)
        kind = _KINDS[values.dtype]

        def work(first: int, stop: int) -> None:
            self._library.nibble_encode(
                values[first:].data_ptr(),
                kind,
                stop - first,
                block_size,
                bound.data_ptr(),
                order.data_ptr(),
                int(measure),
                scale_N[first // block_size :].data_ptr(),
                codes[first // 2 :].data_ptr(),
            )

        in_parts(work, values.numel(), block_size, least=VALUES_PER_THREAD)

    def search(
        self, values: Tensor, absmax_N: Tensor, scale_N: Tensor, *, type: str, block_size: int
    ) -> None:
        """As `search_reference`, for float32 and bfloat16."""
        bound, level, kind = bounds(type), levels(type), _KINDS[values.dtype]
        search = _Search(
            bound.data_ptr(),
            level.data_ptr(),
            FACTORS.data_ptr(),
            FACTORS.numel(),
            NUM_REFITS,
            SMALLEST,
            LARGEST,
            LEAST_GAIN,
        )

        def work(first: int, stop: int) -> None:
            self._library.nibble_search(
                ctypes.byref(search),
                values[first:].data_ptr(),
                kind,
                stop - first,
                block_size,
                absmax_N[first // block_size :].data_ptr(),
                scale_N[first // block_size :].data_ptr(),
            )

        in_parts(work, values.numel(), block_size, least=SEARCHED_PER_THREAD)

    def decode(self, q: Quantized, out_flat: Tensor, start: int) -> None:
        """As `decode_reference`."""
        weight = c_weight(q)
        kind, address, width = _KINDS[out_flat.dtype], out_flat.data_ptr(), out_flat.itemsize

        def work(first: int, stop: int) -> None:
            self._library.nibble_decode(
                ctypes.byref(weight), start + first, stop - first, address + first * width, kind
            )

        in_parts(work, out_flat.numel(), q.block_size, least=VALUES_PER_THREAD)


@cache
def load() -> Library | None:
    """The compiled code, or None where it cannot be built or does not agree."""
    return load_compiled(SOURCE, FLAGS, Library, agrees_with_reference, what="4-bit weights")


def implementation() -> str:
    """The path in use on this CPU, for reports."""
    library = load()
    return f"compiled C ({library.instructions})" if library else "torch reference"


def agrees_with_reference(library: Library) -> bool:
    """Whether encode, search and decode give the reference's bits on a small random weight."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(64 * 40 + 37, generator=generator)
    # One block of zeros, one huge value: the edges of the format.
    values[64:128], values[200] = 0, 3e4
    return all(
        _agrees(library, values.to(dtype), type)
        for type in CODEBOOKS
        for dtype in (torch.float32, torch.bfloat16)
    )


def _agrees(library: Library, values: Tensor, type: str) -> bool:
    num_blocks, num_bytes = -(-values.numel() // 64), (values.numel() + 1) // 2
    written = []
    for encode in (encode_reference, library.encode):
        codes, scale_N = torch.zeros(num_bytes, dtype=torch.uint8), torch.zeros(num_blocks)
        encode(values, codes, scale_N, type=type, block_size=64, measure=True)
        written.append((codes, scale_N))
    (codes, scale_N), (other_codes, other_scale_N) = written
    if not (torch.equal(codes, other_codes) and torch.equal(scale_N, other_scale_N)):
        return False
    found = []
    for search in (search_reference, library.search):
        found_N = torch.zeros(num_blocks)
        search(values, scale_N, found_N, type=type, block_size=64)
        found.append(found_N)
    if not torch.equal(*found):
        return False
    q = Quantized(codes, *quantize_scales(scale_N), tuple(values.shape), type)
    for dtype in _KINDS:
        expected, got = torch.zeros(2, values.numel() - 3, dtype=dtype)
        decode_reference(q, expected, 3)
        library.decode(q, got, 3)
        if not torch.equal(expected, got):
            return False
    return True
