"""The compiled products of few rows on CPUs; `compiled` builds them. Reference: `few_rows`.

Sums run in float32 and are rounded once. They depend neither on the number of rows nor on the
number of threads.
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nibble.kernels.compiled import in_parts, load_compiled
from nibble.kernels.nf4_cpu import c_weight
from nibble.kernels.nf4_reference import (
    Quantized,
    decode_reference,
    quantize_scales,
)

SOURCE = Path(__file__).with_name("few_rows_cpu.c")
FLAGS = ("-ffp-contract=fast",)
# Work of fewer products of values is done by the calling thread alone.
PRODUCTS_PER_THREAD = 1 << 20
# Columns of y that are made at once: parts begin at multiples of it.
_TILE = 4
_KINDS = {torch.float32: 0, torch.bfloat16: 1}
_POINTER, _INT64 = ctypes.c_void_p, ctypes.c_int64


class _Product(ctypes.Structure):
    """`Product` of few_rows_cpu.c."""

    _fields_ = (
        *((name, _POINTER) for name in ("weight", "dense", "x", "bias", "y")),
        *((name, _INT64) for name in ("rows", "inputs", "out", "kind", "y_kind")),
    )


class StoredWeight:
    """A 4-bit weight, or some of its rows, as the compiled code reads it.

    Args:
        q: A weight whose last dimension is I; its tensors are shared.
        rows: Rows of it, taken as (all O, I); None is all.
    """

    def __init__(self, q: Quantized, rows: slice | None = None) -> None:
        num_in = q.shape[-1]
        self.rows = rows or slice(0, q.numel // num_in)
        self.shape = self.rows.stop - self.rows.start, num_in
        self.quantized = q
        self._weight = c_weight(q)
        self.address = ctypes.addressof(self._weight)

    def is_of(self, codes: Tensor) -> bool:
        """Whether these are the codes, where they were."""
        return self._weight.codes == codes.data_ptr()

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of a model has weights of its own.
        return StoredWeight, (self.quantized, self.rows)


class Library:
    """The operations of the compiled code on float32 and bfloat16.

    Columns of y are split over `torch.get_num_threads()` threads.

    Args:
        path: The shared library.

    Raises:
        OSError: If it cannot be loaded.
    """

    def __init__(self, path: Path) -> None:
        code: Any = ctypes.CDLL(str(path))
        code.nibble_few_rows_instructions.restype = ctypes.c_char_p
        code.nibble_few_rows_memory.argtypes = [_INT64, _INT64]
        code.nibble_few_rows_memory.restype = _INT64
        code.nibble_few_rows.argtypes = [_POINTER, _INT64, _INT64, _POINTER]
        code.nibble_few_rows.restype = None
        code.nibble_add_update.argtypes = [
            *(_POINTER, _POINTER, ctypes.c_float, *[_INT64] * 4, _POINTER)
        ]
        code.nibble_add_update.restype = None
        self._code = code
        self.instructions: str = code.nibble_few_rows_instructions().decode()

    def product(
        self,
        x: Tensor,
        weight: Tensor | StoredWeight,
        bias: Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """As `few_rows_product`, with the result in `dtype`, which is that of x where None.

        Args:
            weight: Dense, of the type of x and with rows that lie in order; or in 4 bits.
            bias: Of the type of x.
        """
        num_out, num_in = weight.shape
        x_TI = x if x.is_contiguous() else x.contiguous()
        num_rows, dtype = x.numel() // max(1, num_in), dtype or x.dtype
        y = x.new_empty((*x.shape[:-1], num_out), dtype=dtype)
        is_stored = isinstance(weight, StoredWeight)
        start = weight.rows.start if is_stored else 0
        product = _Product(
            weight.address if is_stored else None,
            None if is_stored else weight.data_ptr(),
            x_TI.data_ptr(),
            None if bias is None else bias.data_ptr(),
            # The code counts columns from the first row of the stored weight.
            y.data_ptr() - start * y.itemsize,
            *(num_rows, num_in, num_out, _KINDS[x.dtype], _KINDS[dtype]),
        )
        address = ctypes.addressof(product)
        num_floats = (num_rows + _TILE) * (num_in + 31)

        def work(first: int, stop: int) -> None:
            memory = torch.empty(num_floats)
            self._code.nibble_few_rows(address, start + first, start + stop, memory.data_ptr())

        by_column = max(1, num_rows * num_in)
        if by_column * num_out < 2 * PRODUCTS_PER_THREAD:
            work(0, num_out)
        else:
            in_parts(work, num_out, _TILE, least=max(_TILE, PRODUCTS_PER_THREAD // by_column))
        return y

    def add_update_(
        self, y: Tensor, x: Tensor, lora_A: Tensor, lora_B_RO: Tensor, scale: float
    ) -> None:
        """As `add_update_` there, all of one type; x A^T is kept in float32."""
        xa_TR = self.product(x, lora_A, dtype=torch.float32)
        rank, num_out = lora_B_RO.shape
        self._code.nibble_add_update(
            *(xa_TR.data_ptr(), lora_B_RO.data_ptr(), scale, xa_TR.numel() // rank),
            *(rank, num_out, _KINDS[y.dtype], y.data_ptr()),
        )


@cache
def load() -> Library | None:
    """The compiled code, or None where it cannot be built or does not agree."""
    return load_compiled(SOURCE, FLAGS, Library, agrees_with_reference, what="products of few rows")


def implementation() -> str:
    """The path in use on this CPU, for reports."""
    library = load()
    return f"compiled C ({library.instructions})" if library else "torch"


def agrees_with_reference(library: Library) -> bool:
    """Whether products with small dense and 4-bit weights are what torch makes of them."""
    cases = ((dtype, *shape) for dtype in _KINDS for shape in ((1, 128), (6, 128), (3, 37)))
    return all(_agrees(library, *case) for case in cases)


def _agrees(library: Library, dtype: torch.dtype, num_rows: int, num_in: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_rows, num_in, generator=generator).to(dtype)
    codes = torch.randint(256, ((5 * num_in + 1) // 2,), generator=generator).byte()
    scales = torch.rand(-(-5 * num_in // 64), generator=generator) + 0.1
    q = Quantized(codes, *quantize_scales(scales), (5, num_in))
    dense = torch.empty(5 * num_in, dtype=dtype)
    decode_reference(q, dense, 0)
    weights = dense.view(5, num_in), StoredWeight(q)
    expected = x.double() @ weights[0].double().T
    return all(
        torch.allclose(
            library.product(x, weight, dtype=torch.float32).double(), expected, rtol=1e-4, atol=1e-3
        )
        for weight in weights
    )
