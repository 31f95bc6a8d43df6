"""Products of few rows with a frozen weight, for decoding: y = x W^T + b.

A decode step multiplies one row a sequence. Here the sums of a row depend neither on how many rows
there are nor on the number of threads, so an answer does not depend on what else is in its batch.
A weight in 4 bits is multiplied as it is stored: no dense copy is written.

Within `few_rows()` frozen layers come here with up to `MOST_ROWS` rows. Elsewhere, and with more
rows, they do what they do in training.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn import functional as F

from nibble.kernels.few_rows_cpu import Library, StoredWeight, load
from nibble.kernels.nf4 import dequantize
from nibble.kernels.target import device_type, is_fake

MOST_ROWS = 64
_TYPES = (torch.float32, torch.bfloat16)

_is_on: ContextVar[bool] = ContextVar("few rows", default=False)


@contextmanager
def few_rows() -> Iterator[None]:
    """Within the block, and without gradients, frozen layers multiply few rows by this module."""
    token = _is_on.set(True)
    try:
        yield
    finally:
        _is_on.reset(token)


def is_few(x: Tensor) -> bool:
    """Whether the rows of x, (..., I), are to be multiplied here."""
    return _is_on.get() and x.numel() <= MOST_ROWS * x.shape[-1] and not torch.is_grad_enabled()


def few_rows_product(
    x: Tensor, weight: Tensor | StoredWeight, bias: Tensor | None = None
) -> Tensor:
    """x W^T + b in the type of x, by compiled code on a CPU.

    Shapes:
        x: (..., I), up to `MOST_ROWS` rows. weight: (O, I). bias: (O,). -> (..., O).
    """
    library = _library_for(x, weight)
    if library is None:
        return few_rows_product_reference(x, weight, bias)
    return library.product(x, weight, None if bias is None else bias.to(x.dtype))


def add_update_(y: Tensor, x: Tensor, lora_A: Tensor, lora_B_RO: Tensor, scale: float) -> None:
    """y += scale * x A^T B^T, in place.

    Shapes:
        y: (..., O), dense. x: (..., I). lora_A: (R, I). lora_B_RO: B^T, (R, O).
    """
    lora_A, lora_B_RO = lora_A.to(x.dtype), lora_B_RO.to(x.dtype)
    library = _library_for(x, lora_A) if is_few(x) and y.dtype == x.dtype else None
    if library is not None:
        library.add_update_(y, x, lora_A, lora_B_RO.contiguous(), scale)
        return
    multiply = few_rows_product_reference if is_few(x) else F.linear
    x_TI, y_TO = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
    y_TO.add_(multiply(multiply(x_TI, lora_A), lora_B_RO.T), alpha=scale)


def few_rows_product_reference(
    x: Tensor, weight: Tensor | StoredWeight, bias: Tensor | None = None
) -> Tensor:
    """The same by torch: row by row on a CPU, elsewhere always `MOST_ROWS` rows at once."""
    if isinstance(weight, StoredWeight):
        q, rows = weight.quantized, weight.rows
        weight = dequantize(q, dtype=x.dtype).view(-1, q.shape[-1])[rows]
    dense = weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    x_TI = x.reshape(-1, x.shape[-1])
    if device_type(x) == "cpu":
        rows = [F.linear(row, dense, bias) for row in x_TI.split(1)]
        y_TO = torch.cat(rows) if rows else x.new_empty(0, len(dense))
    else:
        padded = F.pad(x_TI, (0, 0, 0, MOST_ROWS - len(x_TI)))
        y_TO = F.linear(padded, dense, bias)[: len(x_TI)]
    return y_TO.view(*x.shape[:-1], -1)


def _library_for(x: Tensor, weight: Tensor | StoredWeight) -> Library | None:
    """The compiled code if it is for these tensors."""
    if device_type(x) != "cpu" or is_fake(x) or x.dtype not in _TYPES:
        return None
    if isinstance(weight, StoredWeight):
        return load()
    is_plain = type(weight) in (Tensor, Parameter) and weight.is_contiguous()
    return load() if is_plain and weight.dtype == x.dtype and weight.is_cpu else None
