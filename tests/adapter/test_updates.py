"""Rows of an update are those of the whole product."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nibble.adapter.updates import Update


def _update(num_parts, num_out, num_in, rank):
    generator = torch.Generator().manual_seed(0)
    factors = tuple(
        (
            torch.randn(rank, num_in, generator=generator),
            torch.randn(num_out, rank, generator=generator),
        )
        for _ in range(num_parts)
    )
    whole = torch.cat([1.5 * lora_B @ lora_A for lora_A, lora_B in factors])
    return Update(factors, 1.5), whole


@given(
    num_parts=st.integers(1, 4),
    num_out=st.integers(1, 6),
    num_in=st.integers(1, 5),
    rank=st.integers(1, 3),
    data=st.data(),
)
def test_rows_of_any_run(num_parts, num_out, num_in, rank, data):
    update, whole = _update(num_parts, num_out, num_in, rank)
    first = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(first, len(whole)))
    assert update.shape == tuple(whole.shape)
    found = update.rows(first, stop)
    assert found.shape == (stop - first, num_in)
    torch.testing.assert_close(found, whole[first:stop], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_are_in_float32(dtype):
    update, _ = _update(1, 4, 3, 2)
    ((lora_A, lora_B),) = update.factors
    narrow = Update(((lora_A.to(dtype), lora_B.to(dtype)),), 1.5)
    expected = 1.5 * lora_B.to(dtype).float() @ lora_A.to(dtype).float()
    torch.testing.assert_close(narrow.rows(0, 4), expected)
