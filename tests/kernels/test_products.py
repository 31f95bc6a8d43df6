"""The type of products: a function of the processor, and the same results either way."""

import pytest
import torch
from torch import nn

from nibble.kernels import products
from nibble.kernels.cross_entropy import head_cross_entropy
from nibble.kernels.products import cpu_product_dtype, has_matrix_units, product_dtype
from nibble.kernels.target import planned_device
from nibble.model.linear4bit import DenseLinear, Linear4bit
from nibble.model.lora import LoRALinear

BOTH = (torch.bfloat16, torch.float32)


@pytest.fixture
def fresh():
    def forget():
        cpu_product_dtype.cache_clear()
        has_matrix_units.cache_clear()

    forget()
    yield
    forget()


@pytest.mark.parametrize(
    ("has_vectors", "has_units", "vendor", "expected"),
    [
        (False, False, "AuthenticAMD", torch.float32),
        (True, False, "AuthenticAMD", torch.bfloat16),
        (True, False, "GenuineIntel", torch.float32),
        (True, True, "GenuineIntel", torch.bfloat16),
        (False, False, "", torch.float32),
    ],
)
def test_the_processor_decides(
    monkeypatch, fresh, tmp_path, has_vectors, has_units, vendor, expected
):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_vectors)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_units)
    (tmp_path / "cpuinfo").write_text(f"vendor_id\t: {vendor}\n")
    monkeypatch.setattr(products, "_CPU_INFO", tmp_path / "cpuinfo")
    assert cpu_product_dtype() == expected
    assert has_matrix_units() is has_units


def test_it_is_one_of_two_also_where_the_processor_is_not_told(monkeypatch, fresh, tmp_path):
    monkeypatch.setattr(products, "_CPU_INFO", tmp_path / "none")
    assert cpu_product_dtype() in BOTH


def test_bfloat16_of_a_cpu_alone_is_widened(monkeypatch):
    monkeypatch.setattr(products, "cpu_product_dtype", lambda: torch.float32)
    for dtype in (torch.float32, torch.float16, torch.float64):
        assert product_dtype(torch.ones(1, dtype=dtype)) == dtype
    narrow = torch.ones(1, dtype=torch.bfloat16)
    assert product_dtype(narrow) == torch.float32
    with planned_device("cuda"):
        assert product_dtype(narrow) == torch.bfloat16


def _errors(run, inputs):
    """Relative errors of a value and gradients in bfloat16, against float64."""
    exact = run(*[x.double() for x in inputs])
    return [
        float((found.double() - true).norm() / true.norm())
        for found, true in zip(run(*inputs), exact, strict=True)
    ]


def _adapted(stored, weight):
    base = DenseLinear(nn.Linear(96, 48, bias=False))
    base.weight = nn.Parameter(weight, requires_grad=False)
    layer = LoRALinear(stored or base, rank=4, alpha=8, generator=torch.Generator().manual_seed(1))
    layer.lora_B.data = torch.linspace(-1, 1, 48 * 4).view(48, 4)
    return layer.to(weight.dtype if weight.dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("dtype", BOTH)
def test_errors_of_an_adapted_layer(monkeypatch, dtype):
    monkeypatch.setattr(products, "cpu_product_dtype", lambda: dtype)

    def run(x, weight):
        x = x.clone().requires_grad_()
        layer = _adapted(None, weight)
        y = layer(x)
        y.backward(direction.to(y.dtype))
        assert y.dtype == x.grad.dtype == x.dtype
        return y.detach(), x.grad, layer.lora_A.grad, layer.lora_B.grad

    torch.manual_seed(0)
    x, weight = torch.randn(2, 11, 96).bfloat16(), torch.randn(48, 96).bfloat16()
    direction = torch.randn(2, 11, 48).bfloat16()
    assert max(_errors(run, (x, weight))) < 6e-3


@pytest.mark.parametrize("dtype", BOTH)
def test_four_bits_and_their_dense_copy_give_the_same_bits(monkeypatch, dtype):
    monkeypatch.setattr(products, "cpu_product_dtype", lambda: dtype)
    torch.manual_seed(0)
    stored = Linear4bit.from_dense(torch.randn(48, 96))
    x = torch.randn(7, 96).bfloat16()
    dense = _adapted(None, stored.dense_weight().clone())
    assert torch.equal(_adapted(stored, stored.dense_weight())(x), dense(x))
    assert torch.equal(stored(x), dense.base(x))


@pytest.mark.parametrize("dtype", BOTH)
def test_errors_of_the_head(monkeypatch, dtype):
    """2,500 rows of the weight are three slabs, the last of them shorter."""
    monkeypatch.setattr(products, "cpu_product_dtype", lambda: dtype)
    labels = torch.arange(0, 2500, 9)

    def run(hidden, weight):
        hidden = hidden.clone().requires_grad_()
        loss = head_cross_entropy(hidden, weight, labels)
        loss.backward()
        return loss.detach(), hidden.grad

    torch.manual_seed(0)
    hidden = torch.randn(len(labels), 32).bfloat16()
    weight = torch.randn(2500, 32).bfloat16() / 6
    assert max(_errors(run, (hidden, weight))) < 6e-3
