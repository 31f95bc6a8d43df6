"""Attention on short documents against torch's own."""

import pytest
import torch

from nibble.kernels.attention import (
    MOST_TOKENS,
    is_short,
    short_attention,
    short_attention_reference,
)


def states(num_documents=3, heads=6, groups=2, length=13, width=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(num_documents, count, length, width) for count in (heads, groups, groups)]
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("length", [1, 2, 13])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)]
)
def test_values_and_gradients(groups, length, dtype, tolerance):
    inputs = states(groups=groups, length=length, dtype=dtype)
    # As in a model: a document is a slice of (1, H, T, K), so the states are no contiguous block.
    strided = [s.transpose(1, 2).contiguous().transpose(1, 2) for s in inputs]
    outcomes = []
    for function in (short_attention, short_attention_reference):
        y = function(*strided, 0.3)
        direction = torch.linspace(-1, 1, y.numel(), dtype=dtype).view(y.shape)
        outcomes.append((y, *torch.autograd.grad((y * direction).sum(), inputs)))
    for ours, theirs in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_gradient_by_finite_differences():
    inputs = states(num_documents=1, heads=2, groups=1, length=4, width=3)
    assert torch.autograd.gradcheck(lambda *s: short_attention(*s, 0.5), inputs)


def test_when_it_is_used():
    narrow = states(dtype=torch.bfloat16)
    assert is_short(*narrow)
    assert not is_short(*states(dtype=torch.float32))
    assert not is_short(*(s.detach() for s in narrow))
    with torch.no_grad():
        assert not is_short(*narrow)
    assert not is_short(*states(length=MOST_TOKENS + 1, dtype=torch.bfloat16))
