"""Frozen layers: dense and 4-bit give the same bits, and only the input gets a gradient."""

import gc

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from nibble.errors import ModelError
from nibble.kernels.nf4 import dequantize, quantize
from nibble.model import linear4bit
from nibble.model.linear4bit import DenseLinear, Linear4bit

DTYPES = (torch.bfloat16, torch.float32)


def make(kind, dtype, bias=True):
    torch.manual_seed(0)
    if kind is Conv1D:
        layer = Conv1D(48, 96)
        nn.init.normal_(layer.bias)
    else:
        layer = kind(96, 48, bias=bias)
    return layer.to(dtype)


def to_4bit(layer):
    return Linear4bit.from_dense(layer.weight, layer.bias)


@pytest.mark.parametrize("shape", [(7, 96), (2, 5, 96)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [nn.Linear, FalconLinear, Conv1D])
def test_dense_linear_computes_what_its_layer_computes(kind, dtype, shape):
    layer = make(kind, dtype)
    dense = DenseLinear(layer)
    inputs = [torch.randn(shape).to(dtype).requires_grad_() for _ in range(2)]
    inputs[1].data.copy_(inputs[0])
    expected, got = layer(inputs[0]), dense(inputs[1])
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(got, expected, **tolerance)
    if kind is nn.Linear:
        assert torch.equal(got, expected)
    grad = torch.randn_like(expected)
    expected.backward(grad)
    got.backward(grad)
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, **tolerance)


@pytest.mark.parametrize("kind", [nn.Linear, FalconLinear, Conv1D])
def test_dense_linear_shares_and_freezes_the_parameters(kind):
    layer = make(kind, torch.float32)
    names = {name for name, _ in layer.named_parameters()}
    dense = DenseLinear(layer)
    assert dense.weight is layer.weight
    assert {name for name, _ in dense.named_parameters()} == names
    assert not any(p.requires_grad for p in dense.parameters())
    assert (dense.in_features, dense.out_features) == (96, 48)
    assert dense.dense_weight().shape == (48, 96)
    assert dense.dense_weight().data_ptr() == layer.weight.data_ptr()
    assert dense.dense_weight(torch.bfloat16).dtype == torch.bfloat16


def test_dense_linear_stands_on_meta():
    dense = DenseLinear(nn.Linear(96, 48, device="meta"))
    assert dense(torch.empty(3, 96, device="meta")).shape == (3, 48)


@pytest.mark.parametrize("options", [{}, {"type": "fp4", "double": False}, {"search": True}])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_equals_dense_linear_on_the_dequantised_weight(bias, dtype, options):
    layer = make(nn.Linear, dtype, bias=bias)
    stored = Linear4bit.from_dense(layer.weight, layer.bias, **options)
    layer.weight.data = stored.dense_weight(dtype).clone()
    dense = DenseLinear(layer)
    x = torch.randn(3, 11, 96).to(dtype)
    results = []
    for module in (dense, stored):
        x_own = x.clone().requires_grad_()
        y = module(x_own)
        y.backward(torch.ones_like(y))
        results.append((y, x_own.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_bias_of_another_dtype_is_cast():
    layer = Linear4bit.from_dense(torch.randn(48, 96), torch.randn(48))
    x = torch.randn(3, 96, dtype=torch.bfloat16)
    expected = F.linear(x, layer.dense_weight().clone(), layer.bias.to(torch.bfloat16))
    assert layer(x).dtype == torch.bfloat16
    torch.testing.assert_close(layer(x), expected, rtol=2**-7, atol=2**-7)


def test_quantized_and_back():
    q = quantize(torch.randn(48, 96))
    layer = Linear4bit(q, torch.zeros(48, dtype=torch.bfloat16))
    assert torch.equal(dequantize(layer.quantized), dequantize(q))
    assert layer.codes.data_ptr() == q.codes.data_ptr()
    assert {name: (p.dtype, tuple(p.shape)) for name, p in layer.named_parameters()} == {
        "codes": (torch.uint8, (2304,)),
        "absmax": (torch.uint8, (72,)),
        "nested_absmax": (torch.float32, (1,)),
        "offset": (torch.float32, (1,)),
        "bias": (torch.bfloat16, (48,)),
    }
    assert not any(p.requires_grad for p in layer.parameters())
    assert not list(layer.buffers())


def test_state_dict_round_trip():
    layer, other = (Linear4bit.from_dense(torch.randn(48, 96)) for _ in range(2))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.dense_weight().clone(), layer.dense_weight())


def test_gradient_is_for_the_input_alone():
    layer = Linear4bit.from_dense(torch.randn(48, 96), torch.randn(48))
    x = torch.randn(5, 96, requires_grad=True)
    layer(x).square().sum().backward()
    W = dequantize(layer.quantized, dtype=torch.float32)
    y = F.linear(x.detach(), W, layer.bias)
    torch.testing.assert_close(x.grad, 2 * y @ W)
    assert all(p.grad is None for p in layer.parameters())


@pytest.mark.parametrize("make_layer", [DenseLinear, to_4bit])
def test_nothing_is_saved_for_backward(make_layer):
    layer = make_layer(nn.Linear(96, 48))
    saved = []
    x = torch.randn(5, 96, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x).sum().backward()
    assert saved == []


def test_layers_share_one_scratch_buffer(monkeypatch):
    scratch = {}
    monkeypatch.setattr(linear4bit, "_SCRATCH", scratch)
    small, large = (
        Linear4bit.from_dense(torch.randn(8, 64)),
        Linear4bit.from_dense(torch.randn(64, 64)),
    )
    first = large.dense_weight()
    assert small.dense_weight().data_ptr() == first.data_ptr()
    assert len(scratch) == 1
    small.dense_weight(torch.float32)
    assert {dtype for _, dtype in scratch} == {torch.bfloat16, torch.float32}


def test_two_layers_in_one_graph():
    first, second = (
        Linear4bit.from_dense(torch.randn(64, 32)),
        Linear4bit.from_dense(torch.randn(16, 64)),
    )
    x = torch.randn(4, 32, requires_grad=True)
    second(first(x)).sum().backward()
    W1 = dequantize(first.quantized, dtype=torch.float32)
    W2 = dequantize(second.quantized, dtype=torch.float32)
    torch.testing.assert_close(x.grad, torch.ones(4, 16) @ W2 @ W1)


def test_recomputation_gives_the_same_gradient():
    layer = Linear4bit.from_dense(torch.randn(64, 64))
    grads = []
    for recompute in (False, True):
        x = torch.linspace(-1, 1, 192).view(3, 64).requires_grad_()
        y = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        y.square().sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


def test_no_dense_copy_stays_alive(monkeypatch):
    monkeypatch.setattr(linear4bit, "_SCRATCH", {})
    before = {id(t) for t in gc.get_objects()}
    layers = [Linear4bit.from_dense(torch.randn(128, 128)) for _ in range(4)]
    x = torch.randn(2, 128, requires_grad=True)
    y = x
    for layer in layers:
        y = layer(y)
    gc.collect()
    new = [t for t in gc.get_objects() if id(t) not in before]
    tensors = [t for t in new if type(t) is torch.Tensor]
    dense = [t for t in tensors if t.is_floating_point() and t.numel() == 128 * 128]
    assert len({t.untyped_storage().data_ptr() for t in dense}) <= 1


def test_other_than_two_dimensions_are_refused():
    with pytest.raises(ValueError, match="2 dimensions, not 3"):
        Linear4bit(quantize(torch.randn(2, 8, 64)))


def test_cast_scales_are_refused_not_misread():
    layer = Linear4bit.from_dense(torch.randn(8, 64)).to(torch.bfloat16)
    with pytest.raises(ModelError, match="float32"):
        layer(torch.randn(1, 64))
