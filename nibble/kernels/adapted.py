"""Products with a frozen matrix and with an update of low rank.

Where a CPU multiplies in a wider type than its tensors have, rows are widened some at a time: wide
factors and results then stay in the cache of a core, and their memory does not grow with the rows.
The sums of a row do not depend on how many rows there are, so y and its gradient keep their bits.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from nibble.kernels.target import is_fake, report_kernel

# Rows that are wide at once: as many as take so many bytes with their results, but not fewer than
# so many. Smaller tiles cost time in calls; of wide layers larger ones would cost memory.
TILE_BYTES = 1 << 24
TILE_ROWS = 1024


def frozen_product(x: Tensor, weight_OI: Tensor, bias: Tensor | None) -> Tensor:
    """y = x W^T + b in the type of x.

    Shapes:
        x: (..., I) -> y: (..., O).

    Args:
        weight_OI: In the type of the product.
    """
    if weight_OI.dtype == x.dtype:
        return F.linear(x, weight_OI, bias)
    x_TI = x.reshape(-1, x.shape[-1])
    y_TO = x.new_empty(len(x_TI), len(weight_OI))
    for rows in _tiles(x_TI, weight_OI):
        y_TO[rows] = F.linear(x_TI[rows].to(weight_OI.dtype), weight_OI, bias)
    return y_TO.view(*x.shape[:-1], -1)


def frozen_gradient(grad_y: Tensor, weight_OI: Tensor) -> Tensor:
    """The gradient of x: grad_y W, (..., O) -> (..., I)."""
    if weight_OI.dtype == grad_y.dtype:
        return grad_y @ weight_OI
    grad_TO = grad_y.reshape(-1, grad_y.shape[-1])
    grad_x_TI = grad_y.new_empty(len(grad_TO), weight_OI.shape[1])
    for rows in _tiles(grad_TO, weight_OI):
        grad_x_TI[rows] = grad_TO[rows].to(weight_OI.dtype) @ weight_OI
    return grad_x_TI.view(*grad_y.shape[:-1], -1)


def adapted_product(
    x: Tensor,
    input_TI: Tensor | None,
    weight_OI: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """y = x W^T + b + scale * input A^T B^T, and input A^T; both in the type of x.

    Shapes:
        x: (..., I) -> y: (..., O), new memory and no view.

    Args:
        input_TI: What A is multiplied with, after dropout; None is x.
        weight_OI: In the type of the product, as A and B.
    """
    factors, dtype = (weight_OI, bias, lora_A, lora_B, scale), weight_OI.dtype
    if dtype == x.dtype:
        return _product_of_rows(x, input_TI, *factors)
    x_TI = x.reshape(-1, x.shape[-1])
    y, xa_TR = x.new_empty(*x.shape[:-1], len(weight_OI)), x.new_empty(len(x_TI), len(lora_A))
    y_TO = y.view(-1, len(weight_OI))
    for rows in _tiles(x_TI, weight_OI):
        input_wide = None if input_TI is None else input_TI[rows].to(dtype)
        y_TO[rows], xa_TR[rows] = _product_of_rows(x_TI[rows].to(dtype), input_wide, *factors)
    return y, xa_TR


def adapted_gradients(
    grad_TO: Tensor,
    input_TI: Tensor,
    xa_TR: Tensor,
    weight_OI: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor,
    scale: float,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Gradients of x, of A, of B, and of input A^T, which is scale * grad_y B.

    That of x is grad_y W + grad_xa A, in the type of grad_y; the others have that of the product.

    Args:
        weight_OI: None where no gradient of x is needed; it is None then.
        lora_A: None where A got another input than W; the second term is left out then.
    """
    factors = weight_OI, lora_A, lora_B, scale
    if lora_B.dtype == grad_TO.dtype:
        return _gradients_of_rows(grad_TO, input_TI, xa_TR, *factors)
    grad_x_TI = None if weight_OI is None else torch.empty_like(input_TI)
    grad_xa_TR = lora_B.new_empty(xa_TR.shape)
    grad_A, grad_B_RO = (
        lora_B.new_zeros(xa_TR.shape[1], width) for width in (input_TI.shape[1], len(lora_B))
    )
    for rows in _tiles(grad_TO, lora_B if weight_OI is None else weight_OI):
        grad_wide, input_wide, xa_wide = (
            values[rows].to(lora_B.dtype) for values in (grad_TO, input_TI, xa_TR)
        )
        grad_x, grad_A_part, grad_B_part, grad_xa_TR[rows] = _gradients_of_rows(
            grad_wide, input_wide, xa_wide, *factors
        )
        grad_A += grad_A_part
        grad_B_RO += grad_B_part.T
        if grad_x_TI is not None and grad_x is not None:
            grad_x_TI[rows] = grad_x
    return grad_x_TI, grad_A, grad_B_RO.T, grad_xa_TR


def _product_of_rows(
    x: Tensor,
    input_TI: Tensor | None,
    weight_OI: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    input_TI = x.reshape(-1, x.shape[-1]) if input_TI is None else input_TI
    y, xa_TR = F.linear(x, weight_OI, bias), input_TI @ lora_A.T
    y.view(-1, y.shape[-1]).addmm_(xa_TR, lora_B.T, alpha=scale)
    return y, xa_TR


def _gradients_of_rows(
    grad_TO: Tensor,
    input_TI: Tensor,
    xa_TR: Tensor,
    weight_OI: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor,
    scale: float,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    grad_xa_TR = (grad_TO @ lora_B).mul_(scale)
    grad_A = grad_xa_TR.T @ input_TI
    grad_B = (xa_TR.T @ grad_TO).mul_(scale).T
    grad_x_TI = None if weight_OI is None else grad_TO @ weight_OI
    if grad_x_TI is not None and lora_A is not None:
        grad_x_TI.addmm_(grad_xa_TR, lora_A)
    return grad_x_TI, grad_A, grad_B, grad_xa_TR


def _tiles(rows_TI: Tensor, weight_OI: Tensor) -> Iterator[slice]:
    """Even parts of the rows; of fake ones the first alone, and the rest is reported."""
    num_rows = len(rows_TI)
    most = max(TILE_ROWS, TILE_BYTES // (sum(weight_OI.shape) * weight_OI.itemsize))
    size = max(1, -(-num_rows // max(1, -(-num_rows // most))))
    starts = range(0, num_rows, size)
    if is_fake(rows_TI) and len(starts) > 1:
        rest = num_rows - size
        num_bytes = rest * sum(weight_OI.shape) * weight_OI.itemsize
        report_kernel("product", 2 * rest * weight_OI.numel(), num_bytes)
        starts = starts[:1]
    for start in starts:
        yield slice(start, start + size)
