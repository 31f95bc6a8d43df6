"""Products of few rows: what torch makes of them, whatever else is in the batch."""

from itertools import pairwise

import pytest
import torch

from nibble.kernels import few_rows_cpu
from nibble.kernels.few_rows import (
    MOST_ROWS,
    add_update_,
    few_rows,
    few_rows_product,
    few_rows_product_reference,
    is_few,
)
from nibble.kernels.few_rows_cpu import StoredWeight
from nibble.kernels.nf4 import dequantize, quantize

# Widths that are and are not whole vectors and whole blocks.
SHAPES = [(8, 64), (7, 128), (5, 172), (3, 37), (66, 192), (1, 1)]
TYPES = [torch.float32, torch.bfloat16]


def _values(*shape, dtype, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _tolerance(dtype):
    return {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}


def _weights(shape, dtype):
    """A dense weight, and 4-bit ones of all kinds with their dense values."""
    dense = _values(*shape, dtype=dtype, seed=1)
    yield dense, dense
    for kind, block_size, double in (
        *(("nf4", 64, True), ("nf4", 32, False), ("fp4", 128, True), ("nf4", 4096, True)),
    ):
        q = quantize(dense, type=kind, block_size=block_size, double=double)
        yield StoredWeight(q), dequantize(q, dtype=dtype)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_those_of_the_dense_weight(shape, dtype):
    bias = _values(shape[0], dtype=dtype, seed=3)
    for weight, dense in _weights(shape, dtype):
        for num_rows in (1, 2, 3, 4, 5, 8, 19, MOST_ROWS):
            x = _values(num_rows, shape[1], dtype=dtype, seed=2)
            expected = (x.double() @ dense.double().T + bias.double()).to(dtype)
            for multiply in (few_rows_product, few_rows_product_reference):
                found = multiply(x, weight, bias)
                torch.testing.assert_close(found, expected, **_tolerance(dtype))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_row_does_not_depend_on_the_others_nor_on_threads(shape, dtype, monkeypatch):
    monkeypatch.setattr(few_rows_cpu, "PRODUCTS_PER_THREAD", 1)
    x = _values(MOST_ROWS, shape[1], dtype=dtype)
    for weight, _ in _weights(shape, dtype):
        whole = few_rows_product(x, weight)
        for start, stop in pairwise((0, 1, 3, 6, 10, 15, 40, MOST_ROWS)):
            assert torch.equal(few_rows_product(x[start:stop], weight), whole[start:stop])
        monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
        assert torch.equal(few_rows_product(x, weight), whole)
        monkeypatch.undo()
        monkeypatch.setattr(few_rows_cpu, "PRODUCTS_PER_THREAD", 1)


def test_the_compiled_code_is_what_multiplies(monkeypatch):
    if few_rows_cpu.load() is None:
        pytest.skip("there is no C compiler")
    monkeypatch.setattr("nibble.kernels.few_rows.few_rows_product_reference", None)
    x = torch.ones(2, 64)
    assert torch.equal(few_rows_product(x, torch.ones(3, 64)), torch.full((2, 3), 64.0))


def test_rows_of_a_stored_weight_are_a_weight():
    weight = _values(6, 4, 64, dtype=torch.bfloat16)
    q = quantize(weight)
    x = _values(3, 64, dtype=torch.bfloat16, seed=1)
    whole = few_rows_product(x, StoredWeight(q))
    for expert in range(6):
        rows = slice(4 * expert, 4 * expert + 4)
        part = StoredWeight(q, rows)
        assert torch.equal(few_rows_product(x, part), whole[:, rows])
        reference = few_rows_product_reference(x, part)
        torch.testing.assert_close(reference, whole[:, rows], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("rank", [1, 8, 20])
def test_an_update_is_added_row_by_row(rank, dtype):
    x, y = _values(9, 40, dtype=dtype), _values(9, 50, dtype=dtype, seed=1)
    lora_A, lora_B = (_values(rank, n, dtype=dtype, seed=n) for n in (40, 50))
    expected = y.double() + 0.5 * (x.double() @ lora_A.double().T) @ lora_B.double()
    many = y.clone()
    with few_rows(), torch.no_grad():
        add_update_(many, x, lora_A, lora_B, 0.5)
        for row in range(9):
            one = y[row : row + 1].clone()
            add_update_(one, x[row : row + 1], lora_A, lora_B, 0.5)
            assert torch.equal(one, many[row : row + 1])
    torch.testing.assert_close(many, expected.to(dtype), **_tolerance(dtype))
    in_training = y.clone()
    add_update_(in_training, x, lora_A, lora_B, 0.5)
    tolerance = {"rtol": 5e-2, "atol": 0.2} if dtype == torch.bfloat16 else _tolerance(dtype)
    torch.testing.assert_close(in_training, expected.to(dtype), **tolerance)


def test_rows_are_few_only_where_asked_and_without_gradients():
    x = torch.ones(MOST_ROWS, 4)
    with torch.no_grad():
        assert not is_few(x)
        with few_rows():
            assert is_few(x)
            assert not is_few(torch.ones(MOST_ROWS + 1, 4))
        assert not is_few(x)
    with few_rows():
        assert not is_few(x)
