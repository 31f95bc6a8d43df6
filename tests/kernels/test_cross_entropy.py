"""The chunked head loss against plain cross-entropy in float64."""

import pytest
import torch
from torch.nn import functional as F

from nibble.kernels import cross_entropy
from nibble.kernels.cross_entropy import (
    head_cross_entropy,
    head_cross_entropy_reference,
    head_metrics,
)

# Rows: one tile, a broken tile, a broken chunk, several chunks.
NUM_ROWS = (1, 8, 13, 256, 600)
OPTIONS = (
    {},
    {"softcap": 3.0},
    {"logit_scale": 0.25},
    {"softcap": 5.0, "logit_scale": 2.0},
)


def make(num_rows, *, dtype=torch.float32, dim=24, vocabulary=57, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_rows, dim, generator=generator).to(dtype)
    weight = torch.randn(vocabulary, dim, generator=generator).to(dtype)
    labels = torch.randint(vocabulary, (num_rows,), generator=generator)
    labels[torch.rand(num_rows, generator=generator) < 0.3] = -100
    labels[0] = 5
    return hidden, weight, labels


def exact(hidden, weight, labels, *, bias=None, factor=1.0, **options):
    """Loss and gradients in float64."""
    inputs = [t.double().requires_grad_() for t in (hidden, weight)]
    bias = None if bias is None else bias.double().requires_grad_()
    loss = head_cross_entropy_reference(*inputs, labels, bias=bias, **options)
    (loss * factor).backward()
    return loss.detach(), inputs[0].grad, inputs[1].grad, None if bias is None else bias.grad


def relative(got, expected):
    return ((got.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("num_rows", NUM_ROWS)
def test_float32_loss_and_gradients(num_rows, options):
    hidden, weight, labels = make(num_rows)
    expected, grad_hidden, grad_weight, _ = exact(hidden, weight, labels, factor=0.3, **options)
    hidden.requires_grad_()
    weight.requires_grad_()
    loss = head_cross_entropy(hidden, weight, labels, **options)
    (loss * 0.3).backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert relative(hidden.grad, grad_hidden) < 1e-6
    assert relative(weight.grad, grad_weight) < 1e-6


def test_bias_and_its_gradient():
    hidden, weight, labels = make(300)
    bias = torch.randn(57)
    options = {"bias": bias, "softcap": 4.0}
    expected, grad_hidden, _, grad_bias = exact(hidden, weight, labels, factor=0.3, **options)
    hidden.requires_grad_()
    bias.requires_grad_()
    loss = head_cross_entropy(hidden, weight, labels, **options)
    (loss * 0.3).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert relative(hidden.grad, grad_hidden) < 1e-6
    assert relative(bias.grad, grad_bias) < 1e-6


@pytest.mark.parametrize("options", OPTIONS)
def test_bfloat16_is_within_one_rounding(options):
    hidden, weight, labels = make(600, dtype=torch.bfloat16, dim=64, vocabulary=300)
    # Logits near 1, where bfloat16 carries them well
    weight *= 0.125
    expected, grad_hidden, grad_weight, _ = exact(hidden, weight, labels, **options)
    hidden.requires_grad_()
    weight.requires_grad_()
    loss = head_cross_entropy(hidden, weight, labels, **options)
    loss.backward()
    unit = torch.finfo(torch.bfloat16).eps / 2
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    assert relative(hidden.grad, grad_hidden) < unit
    assert relative(weight.grad, grad_weight) < unit


def test_tied_head_gets_both_gradients():
    weight = torch.randn(57, 24, requires_grad=True)
    tokens, labels = torch.arange(40) % 57, (torch.arange(40) + 1) % 57
    head_cross_entropy(F.embedding(tokens, weight), weight, labels).backward()
    tied = weight.detach().double().requires_grad_()
    head_cross_entropy_reference(F.embedding(tokens, tied), tied, labels).backward()
    assert relative(weight.grad, tied.grad) < 1e-6


def test_rows_without_target_cost_nothing():
    hidden, weight, labels = make(600)
    hidden[labels == -100] = float("nan")
    hidden.requires_grad_()
    loss = head_cross_entropy(hidden, weight, labels)
    loss.backward()
    assert torch.isfinite(loss)
    assert (hidden.grad[labels == -100] == 0).all()
    kept = labels != -100
    fewer = hidden.detach()[kept].requires_grad_()
    head_cross_entropy(fewer, weight, labels[kept]).backward()
    assert torch.equal(hidden.grad[kept], fewer.grad)


def test_no_target_at_all():
    hidden, weight, labels = make(5)
    hidden.requires_grad_()
    loss = head_cross_entropy(hidden, weight, torch.full_like(labels, -100))
    loss.backward()
    assert loss.item() == 0
    assert (hidden.grad == 0).all()


def test_large_logits_do_not_overflow():
    hidden, weight, labels = make(20)
    hidden = (hidden * 1e4).requires_grad_()
    loss = head_cross_entropy(hidden, weight, labels)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(hidden.grad).all()


def test_frozen_weight_gets_no_gradient():
    hidden, weight, labels = make(20)
    hidden.requires_grad_()
    head_cross_entropy(hidden, weight, labels).backward()
    assert weight.grad is None


def test_gradient_work_is_left_out_without_gradients(monkeypatch):
    hidden, weight, labels = make(20)
    monkeypatch.setattr(cross_entropy, "_loss_and_gradient_", None)
    expected = exact(hidden, weight, labels)[0].item()
    with torch.no_grad():
        loss = head_cross_entropy(hidden.requires_grad_(), weight, labels)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert head_cross_entropy(hidden.detach(), weight, labels).item() == loss.item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS)
def test_metrics(options, dtype):
    hidden, weight, labels = make(600, dtype=dtype)
    weight[5] = hidden[0]  # makes row 0 right
    loss, num_correct = head_metrics(hidden, weight, labels, **options)
    expected, *_ = exact(hidden, weight, labels, **options)
    logits = (hidden.double() @ weight.double().T).to(dtype)
    kept = labels != -100
    right = (logits.argmax(-1) == labels)[kept].sum().item()
    assert loss.item() == pytest.approx(
        expected.item(), rel=1e-6 if dtype == torch.float32 else 1e-3
    )
    # bfloat16 rounds some logits to ties
    assert abs(num_correct.item() - right) <= (0 if dtype == torch.float32 else 3)
    assert num_correct.dtype == torch.int64


def test_full_logits_never_exist():
    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, torch.Tensor):
                    self.numel = max(self.numel, tensor.numel())
            return result

    hidden, weight, _ = make(2000, vocabulary=1000)
    hidden.requires_grad_()
    with Largest() as mode:
        head_cross_entropy(hidden, weight, torch.arange(2000) % 1000)
    assert mode.numel == cross_entropy.CHUNK_ROWS * 1000
