"""Triton's norms, gated units, rotations and head against torch in float64 and against torch.

On a CUDA device by `pytest -m gpu`; elsewhere `test_triton.py` runs this file by the interpreter.
"""

import os

import pytest
import torch
from torch.nn import functional as F

from nibble.kernels import cross_entropy, layers, layers_triton, rotary
from nibble.kernels.layers_triton import Library

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1",
        reason="needs a CUDA device or TRITON_INTERPRET=1",
    ),
    pytest.mark.filterwarnings("ignore:overflow encountered"),  # numpy, in the interpreter
]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDTHS = (1, 15, 16, 33, 1024, 1500)


@pytest.fixture(autouse=True)
def everywhere(monkeypatch):
    """Layers use Triton on this device, on a CPU too."""
    for module in (layers, cross_entropy, rotary):
        monkeypatch.setattr(module, "library_for", lambda *tensors: Library())


def draw(*shape, dtype=torch.bfloat16, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator)).to(DEVICE, dtype)


def assert_close(ours, exact, *, roundings=1.0, dtype=torch.bfloat16):
    """Within so many half steps of the type."""
    unit = max(torch.finfo(dtype).eps / 2, 2e-6)
    bound = roundings * unit * exact.abs() + max(1e-6, torch.finfo(dtype).smallest_normal)
    assert ((ours.double() - exact).abs() <= bound).all()


def assert_rounded_alike(ours, theirs):
    """A step of rounding apart in few values: what comes before it differs by 1e-7."""
    torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=1e-6)
    assert (ours != theirs).sum() <= 1 + 0.01 * ours.numel()


def value_and_gradients(function, inputs, **options):
    inputs = [x.clone().requires_grad_() if isinstance(x, torch.Tensor) else x for x in inputs]
    y = function(*inputs, **options)
    direction = torch.linspace(-1, 1, y.numel(), device=DEVICE).view(y.shape).to(y.dtype)
    return y, *torch.autograd.grad(y, [x for x in inputs if isinstance(x, torch.Tensor)], direction)


def test_agrees():
    assert layers_triton.agrees_with_reference(torch.device(DEVICE))


@pytest.mark.parametrize("name", ["norm_again", "norm_gradient", "gated"])
def test_code_that_is_wrong_is_noticed(monkeypatch, name):
    monkeypatch.setattr(Library, name, lambda self, x, *others: x.clone())
    assert not layers_triton.agrees_with_reference(torch.device(DEVICE))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("unit_offset", [False, True])
def test_norm(width, unit_offset, dtype):
    x, grad = draw(5, width, dtype=dtype), draw(5, width, dtype=dtype, seed=2)
    weight, library = draw(width, dtype=dtype, seed=1), Library()
    y, rstd = library.norm(x, weight, 1e-6, unit_offset)
    wide = x.double().requires_grad_()
    exact_rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
    exact = wide * exact_rstd * (weight.double() + unit_offset)
    assert_close(rstd, exact_rstd, dtype=torch.float32)
    assert_close(y, exact, roundings=1 if unit_offset else 2.01, dtype=dtype)
    assert torch.equal(library.norm_again(x, weight, rstd, unit_offset), y)
    (exact_grad,) = torch.autograd.grad(exact, wide, grad.double())
    grad_x = library.norm_gradient(x, weight, rstd, grad, unit_offset)
    # Differences of close numbers: the error is measured by the size of the row.
    assert (grad_x.double() - exact_grad).norm() <= 1e-2 * exact_grad.norm() + 1e-2


@pytest.mark.parametrize("unit_offset", [False, True])
def test_norm_rounds_where_the_reference_rounds(unit_offset):
    x, weight = draw(3, 2, 200), draw(200, seed=1)
    library = Library()
    y, _ = library.norm(x, weight, 1e-6, unit_offset)
    assert y.shape == x.shape
    assert_rounded_alike(y, layers.rms_norm_reference(x, weight, 1e-6, unit_offset=unit_offset))


@pytest.mark.parametrize("rows", [1, 31, 33])
def test_several_rows_of_a_program(rows):
    x, weight = draw(rows, 128), draw(128, seed=1)
    y, rstd = Library().norm(x, weight, 1e-6, False)
    assert_rounded_alike(y, layers.rms_norm_reference(x, weight, 1e-6, unit_offset=False))
    assert rstd.shape == (rows, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("activation", layers.ACTIVATIONS)
def test_gated(width, activation, dtype):
    inputs = draw(5, width, dtype=dtype, scale=4.0), draw(5, width, dtype=dtype, seed=1)
    exact = value_and_gradients(
        layers.gated_reference, [x.double() for x in inputs], activation=activation
    )
    for ours, true in zip(
        value_and_gradients(layers.gated, inputs, activation=activation), exact, strict=True
    ):
        assert ours.dtype == dtype
        assert_close(ours, true, roundings=3.01, dtype=dtype)


@pytest.mark.parametrize("activation", layers.ACTIVATIONS)
def test_gated_rounds_where_the_reference_rounds(activation):
    # Far below 0 torch's own gelu is a difference of close numbers.
    inputs = draw(3, 400), draw(3, 400, seed=1)
    theirs = value_and_gradients(layers.gated_reference, inputs, activation=activation)
    ours = value_and_gradients(layers.gated, inputs, activation=activation)
    for a, b in zip(ours, theirs, strict=True):
        assert_rounded_alike(a, b)


@pytest.mark.parametrize("width", [33, 1500])
def test_gated_halves_of_one_product(width):
    both = draw(5, 2 * width, scale=4.0)
    halves, grad = both.chunk(2, -1), draw(5, width, seed=2)
    library, apart = Library(), [half.contiguous() for half in both.chunk(2, -1)]
    assert torch.equal(library.gated(*halves, "silu"), library.gated(*apart, "silu"))
    for a, b in zip(
        library.gated_gradient(*halves, grad, "silu"),
        library.gated_gradient(*apart, grad, "silu"),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("value", [-1e19, -200.0, -88.0, -20.0, 0.0, 20.0, 88.0, 200.0, 1e19])
@pytest.mark.parametrize("activation", layers.ACTIVATIONS)
def test_gated_at_the_edges(value, activation):
    gate = torch.tensor([[value]], device=DEVICE).bfloat16()
    one, library = torch.ones_like(gate), Library()
    expected = max(0.0, float(gate)) if abs(value) > 10 else 0.0
    assert library.gated(gate, one, activation).item() == pytest.approx(expected, abs=1e-6)
    slope = 1.0 if value > 10 else 0.5 if value == 0 else 0.0
    assert library.gated_gradient(gate, one, one, activation)[0].item() == pytest.approx(
        slope, abs=1e-6
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_packed", [True, False])
@pytest.mark.parametrize(
    ("heads", "width", "turned"), [(4, 2, 2), (3, 16, 16), (5, 34, 34), (70, 64, 64), (4, 32, 24)]
)
def test_rotary_gives_the_bits_of_torch(heads, width, turned, is_packed, dtype):
    x = draw(1, heads, 3, width, dtype=dtype)
    if is_packed:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    cos, sin = draw(2, 1, 3, turned, dtype=dtype, seed=1)
    direction = draw(1, heads, 3, width, dtype=dtype, seed=2)
    outcomes = []
    for function in (lambda x: rotary.rotary(x, x, cos, sin)[0], reference(cos, sin)):
        leaf = x.detach().requires_grad_()
        y = function(leaf)
        outcomes.append((y, *torch.autograd.grad(y, leaf, direction)))
    for ours, theirs in zip(*outcomes, strict=True):
        assert torch.equal(ours, theirs)


def reference(cos, sin):
    return lambda x: rotary.rotary_reference(x, cos[:, None], sin[:, None])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [2, 16, 57, 5000])
@pytest.mark.parametrize(
    ("scale", "softcap"), [(1.0, None), (0.25, None), (1.0, 3.0), (2.0, 5.0), (-1.0, None)]
)
def test_head(width, scale, softcap, dtype):
    raw = draw(7, width, dtype=dtype, scale=4.0)
    labels = torch.arange(7, device=DEVICE) * 3 % width
    wide = raw.double().requires_grad_()
    logits = wide * scale if softcap is None else softcap * torch.tanh(wide * scale / softcap)
    exact = F.cross_entropy(logits, labels, reduction="sum")
    exact.backward()
    shape = cross_entropy._Shape(softcap, scale)
    loss = cross_entropy._loss_and_gradient_(raw, labels, shape)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    assert (raw.double() - wide.grad).norm() <= 4e-3 * wide.grad.norm()


def test_a_large_vocabulary():
    raw = draw(1, 262_144, scale=4.0)
    labels = torch.tensor([262_143], device=DEVICE)
    wide = raw.double().requires_grad_()
    exact = F.cross_entropy(wide, labels, reduction="sum")
    exact.backward()
    assert Library().head_(raw, labels, 1.0, None).item() == pytest.approx(exact.item(), rel=1e-5)
    assert (raw.double() - wide.grad).norm() <= 4e-3 * wide.grad.norm()


def test_large_logits_do_not_overflow():
    raw = draw(4, 100, scale=1e30)
    loss = Library().head_(raw, torch.arange(4, device=DEVICE), 1.0, None)
    assert torch.isfinite(loss)
    assert torch.isfinite(raw).all()


def test_nothing_hides_what_is_not_a_number():
    x, one = draw(2, 40), torch.ones(40, device=DEVICE).bfloat16()
    x[0, 20] = torch.nan
    library, labels = Library(), torch.tensor([3, 4], device=DEVICE)
    for y in (library.norm(x, one, 1e-6, False)[0], library.gated(x, x, "silu")):
        assert y[0].isnan().any()
        assert not y[1].isnan().any()
    assert library.head_(x.clone(), labels, 1.0, None).isnan()


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_is_what_a_cuda_device_uses():
    assert layers_triton.library_for(draw(2, 3)) is not None
    assert layers_triton.library_for(draw(2, 3), draw(3, dtype=torch.float32)) is None
