"""Products of few rows with a frozen weight, for decoding: y = x W^T + b.

A decode step multiplies one row a sequence. Here the sums of a row depend neither on how many rows
there are nor on the number of threads, so an answer does not depend on what else is in its batch.

Within `few_rows()` frozen layers come here with up to `MOST_ROWS` rows. Elsewhere, and with more
rows, they do what they do in training.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.nn import functional as F

from nibble.kernels.nf4 import Quantized, dequantize
from nibble.kernels.target import device_type

MOST_ROWS = 64

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


def few_rows_product(x: Tensor, weight: Tensor | Quantized, bias: Tensor | None = None) -> Tensor:
    """x W^T + b in the type of x.

    Shapes:
        x: (..., I), up to `MOST_ROWS` rows. weight: (O, I). bias: (O,). -> (..., O).
    """
    return few_rows_product_reference(x, weight, bias)


def add_update_(y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float) -> None:
    """y += scale * x A^T B^T, in place.

    Shapes:
        y: (..., O), dense. x: (..., I). lora_A: (R, I). lora_B: (O, R).
    """
    x_TI, y_TO = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
    multiply = few_rows_product if is_few(x) else F.linear
    update_TO = multiply(multiply(x_TI, lora_A.to(x.dtype)), lora_B.to(x.dtype))
    y_TO.add_(update_TO, alpha=scale)


def few_rows_product_reference(
    x: Tensor, weight: Tensor | Quantized, bias: Tensor | None = None
) -> Tensor:
    """The same by torch: row by row on a CPU, elsewhere always `MOST_ROWS` rows at once."""
    dense = dequantize(weight, dtype=x.dtype) if isinstance(weight, Quantized) else weight
    dense = dense.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    x_TI = x.reshape(-1, x.shape[-1])
    if device_type(x) == "cpu":
        rows = [F.linear(row, dense, bias) for row in x_TI.split(1)]
        y_TO = torch.cat(rows) if rows else x.new_empty(0, len(dense))
    else:
        padded = F.pad(x_TI, (0, 0, 0, MOST_ROWS - len(x_TI)))
        y_TO = F.linear(padded, dense, bias)[: len(x_TI)]
    return y_TO.view(*x.shape[:-1], -1)
