"""The compiled code of layers, on every instruction set, against torch in float64."""

import platform
import shutil
import subprocess

import pytest
import torch
from torch.nn import functional as F

from nibble.kernels import layers_cpu
from nibble.kernels.compiled import FLAGS

has_compiler = any(shutil.which(name) for name in ("cc", "gcc", "clang"))
pytestmark = pytest.mark.skipif(not has_compiler, reason="needs a C compiler")
x86_64 = pytest.mark.skipif(platform.machine() != "x86_64", reason="needs an x86-64 CPU")
WIDTHS = (1, 15, 16, 33, 1024)


@pytest.fixture(
    scope="module",
    params=[
        "-march=native",
        pytest.param("-march=x86-64-v3", marks=x86_64),
        pytest.param("-march=x86-64", marks=x86_64),
    ],
)
def library(request, tmp_path_factory):
    """The code built for one instruction set."""
    path = tmp_path_factory.mktemp("library") / f"layers{request.param}.so"
    command = ["cc", *FLAGS, *layers_cpu.FLAGS, request.param, str(layers_cpu.SOURCE)]
    subprocess.run([*command, "-o", str(path), "-lm"], check=True)
    return layers_cpu.Library(path)


def draw(*shape, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator)).bfloat16()


def assert_close(ours, exact, *, roundings=1):
    """Within so many half steps of bfloat16."""
    bound = roundings * 2.0**-8 * exact.abs() + 1e-6
    assert ((ours.double() - exact).abs() <= bound).all()


def test_agrees(library):
    assert layers_cpu.agrees_with_reference(library)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("unit_offset", [False, True])
def test_norm(library, width, unit_offset):
    x, weight, grad = draw(5, width), draw(width, seed=1), draw(5, width, seed=2)
    y, rstd = library.norm(x, weight, 1e-6, unit_offset)
    wide = x.double().requires_grad_()
    exact_rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
    exact = wide * exact_rstd * (weight.double() + unit_offset)
    assert_close(rstd, exact_rstd)
    assert_close(y, exact, roundings=1 if unit_offset else 2.01)
    assert torch.equal(library.norm_again(x, weight, rstd, unit_offset), y)
    (exact_grad,) = torch.autograd.grad(exact, wide, grad.double())
    grad_x = library.norm_gradient(x, weight, rstd, grad, unit_offset)
    # Differences of close numbers: the error is measured by the size of the row.
    assert ((grad_x.double() - exact_grad).norm() <= 1e-2 * exact_grad.norm() + 1e-2).all()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("is_fused", [False, True])
def test_gated(library, width, activation, is_fused):
    gate, up = draw(5, 2 * width, scale=4.0).chunk(2, -1)
    if not is_fused:
        gate, up = gate.contiguous(), up.contiguous()
    grad = draw(5, width, seed=2)
    inputs = [x.double().requires_grad_() for x in (gate, up)]
    act = F.silu(inputs[0]) if activation == "silu" else F.gelu(inputs[0], approximate="tanh")
    exact = act * inputs[1]
    assert_close(library.gated(gate, up, activation), exact, roundings=2.01)
    expected = torch.autograd.grad(exact, inputs, grad.double())
    for ours, true in zip(
        library.gated_gradient(gate, up, grad, activation), expected, strict=True
    ):
        assert_close(ours, true, roundings=2.01)


@pytest.mark.parametrize("value", [-1e19, -200.0, -88.0, -20.0, 0.0, 20.0, 88.0, 200.0, 1e19])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated_at_the_edges(library, value, activation):
    gate, one = torch.tensor([[value]]).bfloat16(), torch.ones(1, 1).bfloat16()
    expected = max(0.0, float(gate)) if abs(value) > 10 else 0.0
    assert library.gated(gate, one, activation).item() == pytest.approx(expected, abs=1e-6)
    slope = 1.0 if value > 10 else 0.5 if value == 0 else 0.0
    assert library.gated_gradient(gate, one, one, activation)[0].item() == pytest.approx(
        slope, abs=1e-6
    )


@pytest.mark.parametrize(("rows", "keys"), [(1, 1), (3, 3), (5, 21), (16, 16), (20, 100)])
@pytest.mark.parametrize("scale", [0.125, 3.0])
def test_attention(library, rows, keys, scale):
    scores, grad = draw(2, rows, keys, scale=5.0).float(), draw(2, rows, keys, seed=1).float()
    wide = scores.double().requires_grad_()
    hidden = torch.ones(rows, keys, dtype=torch.bool).triu(keys - rows + 1)
    exact = (wide * scale).masked_fill(hidden, -torch.inf).softmax(-1)
    p = scores.clone()
    library.attend_(p, scale)
    assert (p.double() - exact).norm() <= 1e-6 * exact.norm()
    assert (p[:, hidden] == 0).all()
    (exact_grad,) = torch.autograd.grad(exact, wide, grad.double())
    again, grad_s = scores.clone(), grad.clone()
    library.attend_gradient_(again, grad_s, scale)
    assert torch.equal(again, p)
    assert (grad_s.double() - exact_grad).norm() <= 1e-6 * exact_grad.norm() + 1e-9
    assert (grad_s[:, hidden] == 0).all()


@pytest.mark.parametrize("width", [2, 16, 57, 1000])
@pytest.mark.parametrize(
    ("scale", "softcap"), [(1.0, None), (0.25, None), (1.0, 3.0), (2.0, 5.0), (-1.0, None)]
)
def test_head(library, width, scale, softcap):
    raw, labels = draw(7, width, scale=4.0), torch.arange(7) * 3 % width
    wide = raw.double().requires_grad_()
    logits = wide * scale if softcap is None else softcap * torch.tanh(wide * scale / softcap)
    exact = F.cross_entropy(logits, labels, reduction="sum")
    exact.backward()
    loss = library.head_(raw, labels, scale, softcap).item()
    assert loss == pytest.approx(exact.item(), rel=1e-6)
    assert (raw.double() - wide.grad).norm() <= 4e-3 * wide.grad.norm()


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_default_type_changes_nothing(library, default):
    x, weight = draw(3, 40), draw(40, seed=1)
    expected = library.norm(x, weight, 1e-6, False)
    torch.set_default_dtype(default)
    try:
        found = library.norm(x, weight, 1e-6, False)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("label", [-1, 40, -100])
def test_labels_outside_of_the_vocabulary_are_refused(library, label):
    with pytest.raises(IndexError, match="below 40"):
        library.head_(draw(2, 40), torch.tensor([3, label]), 1.0, None)


def test_labels_of_any_integer_type(library):
    labels = torch.tensor([3, 39, 0])
    expected, found = draw(3, 40), draw(3, 40)
    loss = library.head_(expected, labels, 1.0, None)
    assert library.head_(found, labels.int(), 1.0, None) == loss
    assert torch.equal(found, expected)


def test_nothing_hides_what_is_not_a_number(library):
    x, one = draw(2, 40), torch.ones(40).bfloat16()
    x[0, 20] = torch.nan
    wide = x[:, None].float()
    library.attend_(wide, 1.0)
    outputs = [library.norm(x, one, 1e-6, False)[0], library.gated(x, x, "silu"), wide[:, 0]]
    assert all(y[0].isnan().any() for y in outputs)
    assert not any(y[1].isnan().any() for y in outputs)
    assert library.head_(x.clone(), torch.tensor([3, 4]), 1.0, None).isnan()


@pytest.mark.parametrize("num_threads", [2, 3])
def test_result_does_not_depend_on_threads(library, monkeypatch, num_threads):
    x, up, weight = draw(50, 70), draw(50, 70, seed=1), draw(70, seed=2)
    labels = torch.arange(50)

    def everything():
        y, rstd = library.norm(x, weight, 1e-6, False)
        scores, grad, raw = x[:, None].float(), up[:, None].float(), x.clone()
        library.attend_gradient_(scores, grad, 0.3)
        loss = library.head_(raw, labels, 1.0, None)
        gradient = library.norm_gradient(x, weight, rstd, up, False)
        pair = library.gated_gradient(x, up, y, "silu")
        return [y, rstd, scores, grad, raw, gradient, *pair, loss]

    expected = everything()
    monkeypatch.setattr(layers_cpu, "VALUES_PER_THREAD", 100)
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    for ours, alone in zip(everything(), expected, strict=True):
        torch.testing.assert_close(ours, alone, rtol=1e-12, atol=0)


def test_what_it_works_on():
    assert layers_cpu.library_for(draw(2, 3)) is layers_cpu.load()
    assert layers_cpu.library_for(draw(2, 3).float()) is None
    assert layers_cpu.library_for(draw(2, 3), draw(3).float()) is None


def test_code_that_is_wrong_is_noticed(library, monkeypatch):
    monkeypatch.setattr(library, "gated", lambda gate, up, kind: gate)
    assert not layers_cpu.agrees_with_reference(library)
