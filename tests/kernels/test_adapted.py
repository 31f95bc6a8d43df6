"""Products some rows at a time against products of all rows, and against autograd."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nibble.kernels import adapted, products
from nibble.kernels.adapted import (
    TILE_ROWS,
    adapted_gradients,
    adapted_product,
    frozen_gradient,
    frozen_product,
)
from nibble.kernels.target import planned_device
from nibble.model.linear4bit import DenseLinear
from nibble.model.lora import LoRALinear
from nibble.plan.tracker import MemoryTracker

ROWS = (1, 7, TILE_ROWS, 2 * TILE_ROWS + 3)
SCALE = 2.0


@pytest.fixture(autouse=True)
def _tiles_by_rows(monkeypatch):
    """Layers as narrow as these would be one tile."""
    monkeypatch.setattr(adapted, "TILE_BYTES", 0)


def _values(num_rows, num_in=48, num_out=96, rank=4):
    torch.manual_seed(num_rows)
    sizes = (num_rows, num_in), (num_out, num_in), (num_rows, num_out), (rank, num_in)
    x, weight, grad_y, A = (torch.randn(size).bfloat16() for size in sizes)
    return x, weight.float(), grad_y, A.float(), torch.randn(num_out, rank).bfloat16().float()


@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_frozen_product_has_the_bits_of_one_product(num_rows, with_bias):
    x, weight, grad_y, _, _ = _values(num_rows)
    bias = torch.randn(len(weight)) if with_bias else None
    y = frozen_product(x[None], weight, bias)
    assert y.shape == (1, num_rows, len(weight))
    assert torch.equal(y[0], F.linear(x.float(), weight, bias).bfloat16())
    assert torch.equal(frozen_gradient(grad_y, weight), (grad_y.float() @ weight).bfloat16())


@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize("has_dropout", [False, True])
def test_adapted_product_equals_autograd(num_rows, has_dropout):
    x, weight, grad_y, A, B = _values(num_rows)
    dropped = (x * (torch.rand(x.shape) > 0.5)).bfloat16() if has_dropout else x
    y, xa = adapted_product(x, dropped if has_dropout else None, weight, None, A, B, SCALE)

    leaves = [value.double().requires_grad_() for value in (x, dropped, A, B)]
    x_in, a_in = leaves[0], leaves[1] if has_dropout else leaves[0]
    expected = x_in @ weight.double().T + SCALE * (a_in @ leaves[2].T) @ leaves[3].T
    expected.backward(grad_y.double())
    torch.testing.assert_close(y.double(), expected.detach(), rtol=4e-3, atol=1e-5)
    assert y.dtype == xa.dtype == torch.bfloat16

    own_A = None if has_dropout else A
    grad_x, grad_A, grad_B, grad_xa = adapted_gradients(
        grad_y, dropped, xa, weight, own_A, B, SCALE
    )
    torch.testing.assert_close(grad_x.double(), leaves[0].grad, rtol=4e-3, atol=1e-5)
    torch.testing.assert_close(grad_A.double(), leaves[2].grad, rtol=1e-4, atol=1e-2)
    error = (grad_B.double() - leaves[3].grad).norm() / leaves[3].grad.norm()
    assert error < 3e-3  # input A^T is kept in bfloat16
    if has_dropout:
        torch.testing.assert_close((grad_xa @ A).double(), leaves[1].grad, rtol=1e-4, atol=1e-2)


def test_tiles_change_no_bit_of_output_and_gradient(monkeypatch):
    x, weight, grad_y, A, B = _values(2 * TILE_ROWS + 3)

    def run():
        y, xa = adapted_product(x, None, weight, None, A, B, SCALE)
        return y, xa, adapted_gradients(grad_y, x, xa, weight, A, B, SCALE)[0]

    by_tiles = run()
    monkeypatch.setattr(adapted, "TILE_ROWS", len(x))
    for ours, whole in zip(by_tiles, run(), strict=True):
        assert torch.equal(ours, whole)


def test_no_gradient_of_x_where_none_is_needed():
    x, weight, grad_y, A, B = _values(5)
    _, xa = adapted_product(x, None, weight, None, A, B, SCALE)
    assert adapted_gradients(grad_y, x, xa, None, A, B, SCALE)[0] is None


def test_wide_values_do_not_grow_with_the_rows(monkeypatch):
    """Peak memory of a layer grows with its inputs, outputs and their gradients in bfloat16."""
    monkeypatch.setattr(products, "cpu_product_dtype", lambda: torch.float32)
    layer = LoRALinear(DenseLinear(nn.Linear(64, 192, bias=False).bfloat16()), rank=4, alpha=8)

    def peak(num_rows):
        x = torch.randn(num_rows, 64).bfloat16().requires_grad_()
        grad_y = torch.randn(num_rows, 192).bfloat16()
        with MemoryTracker() as tracker, planned_device("cpu"):
            tracker.begin("step")
            layer(x).backward(grad_y)
        return tracker.peaks["step"].bytes

    per_row = (peak(6 * TILE_ROWS) - peak(2 * TILE_ROWS)) / (4 * TILE_ROWS)
    # x, y and their gradients; input A^T of rank 4 in two bytes, and its gradient in four.
    assert per_row == 2 * 2 * (192 + 64) + 6 * 4
