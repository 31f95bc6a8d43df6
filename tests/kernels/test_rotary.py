"""Rotations against transformers' own and against autograd."""

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as apply_in_part

from nibble.kernels import layers_cpu
from nibble.kernels.rotary import rotary, rotary_reference


@pytest.fixture(autouse=True, params=["compiled", "torch"])
def code(request, monkeypatch):
    """The code that works on bfloat16."""
    if request.param == "torch":
        monkeypatch.setattr(layers_cpu, "load", lambda: None)
    elif layers_cpu.load() is None:
        pytest.skip("needs a C compiler")


def draw(heads, tokens, width, turned, dtype, *, is_packed, batch=1):
    """Queries or keys as a model has them, token by token or head by head; cos and sin."""
    generator = torch.Generator().manual_seed(heads)
    x = torch.randn(batch, heads, tokens, width, generator=generator).to(dtype)
    if is_packed:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    cos, sin = torch.randn(2, 1, tokens, turned, generator=generator).to(dtype)
    return x.requires_grad_(), cos, sin


def outcome(function, query, key, cos, sin):
    rotated = function(query, key, cos, sin)
    wanted = [torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype) for y in rotated]
    return *rotated, *torch.autograd.grad(rotated, (query, key), wanted)


@pytest.mark.parametrize("is_packed", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [2, 16, 34, 64, 128])
def test_bits_of_transformers(width, dtype, is_packed):
    query, cos, sin = draw(4, 7, width, width, dtype, is_packed=is_packed)
    key = draw(2, 7, width, width, dtype, is_packed=is_packed)[0]
    ours = outcome(rotary, query, key, cos, sin)
    theirs = outcome(apply_rotary_pos_emb, query, key, cos, sin)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def test_a_part_of_each_head():
    query, cos, sin = draw(4, 7, 32, 24, torch.bfloat16, is_packed=True)
    key = draw(2, 7, 32, 24, torch.bfloat16, is_packed=True)[0]
    ours = outcome(rotary, query, key, cos, sin)
    theirs = outcome(apply_in_part, query, key, cos, sin)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def test_several_rows():
    query, cos, sin = draw(4, 5, 8, 8, torch.bfloat16, is_packed=False, batch=3)
    key = draw(2, 5, 8, 8, torch.bfloat16, is_packed=False, batch=3)[0]
    ours = outcome(rotary, query, key, cos, sin)
    theirs = outcome(apply_rotary_pos_emb, query, key, cos, sin)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def test_result_does_not_depend_on_threads(monkeypatch):
    query, cos, sin = draw(16, 40, 64, 64, torch.bfloat16, is_packed=True)
    expected = rotary(query, query, cos, sin)[0]
    monkeypatch.setattr(layers_cpu, "VALUES_PER_THREAD", 64)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(rotary(query, query, cos, sin)[0], expected)


def test_gradient_by_finite_differences():
    x, cos, sin = draw(2, 3, 8, 6, torch.float64, is_packed=False)
    assert torch.autograd.gradcheck(lambda x: rotary(x, x, cos, sin)[0], x)
    expected = rotary_reference(x, cos[:, None], sin[:, None])
    assert torch.equal(rotary(x, x, cos, sin)[1], expected)
