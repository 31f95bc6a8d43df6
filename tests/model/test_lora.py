"""The update against the formula it stands for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nibble.model.linear4bit import DenseLinear, Linear4bit
from nibble.model.lora import LoRALinear


def _layer(num_in=12, num_out=8, **values):
    layer = LoRALinear(DenseLinear(nn.Linear(num_in, num_out)), rank=4, alpha=6, **values)
    nn.init.normal_(layer.lora_B)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_layer_changes_nothing(dtype):
    base = DenseLinear(nn.Linear(16, 8).to(dtype))
    x = torch.randn(3, 5, 16, dtype=dtype)
    assert torch.equal(LoRALinear(base, rank=2, alpha=4)(x), base(x))


@given(st.integers(1, 9), st.integers(1, 70), st.integers(1, 40), st.integers(1, 5))
@settings(deadline=None, max_examples=25)
def test_output_and_gradients_equal_autograd(tokens, num_in, num_out, rank):
    torch.manual_seed(0)
    layer = LoRALinear(DenseLinear(nn.Linear(num_in, num_out)), rank=rank, alpha=3.0).double()
    nn.init.normal_(layer.lora_B)
    x = torch.randn(tokens, num_in, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(tokens, num_out, dtype=torch.float64)
    inputs = (x, layer.lora_A, layer.lora_B)
    plain = nn.functional.linear(x, layer.base.weight, layer.base.bias)
    plain = plain + (x @ layer.lora_A.T) @ layer.lora_B.T * layer.scale
    torch.testing.assert_close(layer(x), plain)
    ours = torch.autograd.grad(layer(x), inputs, grad)
    torch.testing.assert_close(ours, torch.autograd.grad(plain, inputs, grad))


def test_qlora_equals_lora_on_the_dequantised_weight():
    torch.manual_seed(0)
    weight = torch.randn(48, 80, dtype=torch.bfloat16)
    stored = Linear4bit.from_dense(weight)
    dense = nn.Linear(80, 48, bias=False, dtype=torch.bfloat16)
    dense.weight.data = stored.dense_weight().clone()
    x = torch.randn(7, 80, dtype=torch.bfloat16)
    results = []
    for base in (stored, DenseLinear(dense)):
        layer = LoRALinear(base, rank=4, alpha=8, generator=torch.Generator().manual_seed(1))
        layer.lora_B.data = torch.linspace(-1, 1, 48 * 4).view(48, 4)
        inputs = x.clone().requires_grad_()
        y = layer(inputs)
        y.float().square().sum().backward()
        results.append((y, inputs.grad, layer.lora_A.grad, layer.lora_B.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_dropout_reaches_the_update_alone_and_its_gradient_agrees():
    torch.manual_seed(0)
    layer = _layer(dropout=0.5).double().train()
    x = torch.randn(6, 12, dtype=torch.float64, requires_grad=True)

    def run(x, lora_A):
        torch.manual_seed(1)
        return torch.func.functional_call(layer, {"lora_A": lora_A}, (x,))

    assert torch.autograd.gradcheck(run, (x, layer.lora_A.detach().requires_grad_()))
    assert not torch.equal(layer(x), layer.eval()(x))


def test_nothing_but_input_and_its_product_is_saved():
    layer = _layer()
    x = torch.randn(5, 12, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    factors = {layer.lora_A.data_ptr(), layer.lora_B.data_ptr()}
    assert sorted(t.numel() for t in saved if t.data_ptr() not in factors) == [5 * 4, 5 * 12]


def test_delta_weight_is_the_update():
    layer = _layer()
    x = torch.randn(3, 12)
    torch.testing.assert_close(layer(x) - layer.base(x), x @ layer.delta_weight().T)


def test_rslora_scale():
    assert _layer(rslora=True).scale == 3.0


@pytest.mark.parametrize("values", [{"rank": 0}, {"dropout": 1.0}, {"dropout": -0.1}])
def test_bad_arguments(values):
    with pytest.raises(ValueError, match=r"rank|dropout"):
        LoRALinear(DenseLinear(nn.Linear(4, 4)), **{"rank": 1, "alpha": 1, **values})
