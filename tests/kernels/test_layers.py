"""Lean norms and gated units against autograd's, and recipes."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nibble.kernels import layers_cpu
from nibble.kernels.layers import (
    ACTIVATIONS,
    gated,
    gated_reference,
    recipe_of,
    rms_norm,
    rms_norm_reference,
)


@pytest.fixture(autouse=True, params=["compiled", "torch"])
def code(request, monkeypatch):
    """The code that works on bfloat16."""
    if request.param == "torch":
        monkeypatch.setattr(layers_cpu, "load", lambda: None)
    elif layers_cpu.load() is None:
        pytest.skip("needs a C compiler")
    return request.param


def assert_rounded_alike(ours, theirs, code):
    """The same bits by torch; by compiled code, a step of rounding apart in few values."""
    if code == "torch" or ours.dtype != torch.bfloat16:
        assert torch.equal(ours, theirs)
    else:
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=1e-30)
        assert (ours != theirs).sum() <= 1 + 0.01 * ours.numel()


def draw(*shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()


def value_and_gradients(function, inputs, **options):
    y = function(*inputs, **options)
    direction = torch.linspace(-1, 1, y.numel(), dtype=torch.float32).view(y.shape).to(y.dtype)
    wanted = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    return y, *torch.autograd.grad(y, wanted, direction)


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.integers(1, 9),
    width=st.integers(1, 70),
    unit_offset=st.booleans(),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
)
def test_norm(code, rows, width, unit_offset, dtype):
    x, weight = draw(rows, 2, width, dtype=dtype), draw(width, dtype=dtype, seed=1).detach()
    inputs = (x, weight, 1e-6)
    ours = value_and_gradients(rms_norm, inputs, unit_offset=unit_offset)
    theirs = value_and_gradients(rms_norm_reference, inputs, unit_offset=unit_offset)
    assert_rounded_alike(ours[0], theirs[0], code)
    torch.testing.assert_close(
        ours[1], theirs[1], rtol=2e-2, atol=1e-2 if dtype == torch.bfloat16 else 1e-4
    )


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    size=st.integers(1, 200),
    activation=st.sampled_from(ACTIVATIONS),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
)
def test_gated(code, size, activation, dtype):
    inputs = (draw(3, size, dtype=dtype), draw(3, size, dtype=dtype, seed=1), activation)
    ours = value_and_gradients(gated, inputs)
    theirs = value_and_gradients(gated_reference, inputs)
    for a, b in zip(ours, theirs, strict=True):
        assert_rounded_alike(a, b, code)


@pytest.mark.parametrize("unit_offset", [False, True])
def test_a_norm_is_made_again_bit_for_bit(unit_offset):
    x, weight = draw(4, 32, dtype=torch.bfloat16), draw(32, dtype=torch.bfloat16).detach()
    y = rms_norm(x, weight, 1e-5, unit_offset=unit_offset)
    recipe = recipe_of(y)
    recipe.maker.num_uses = 1
    assert torch.equal(recipe.maker.take(*recipe.tensors), y)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_gated_unit_is_made_again_bit_for_bit(activation):
    y = gated(draw(4, 32, dtype=torch.bfloat16), draw(4, 32, dtype=torch.bfloat16), activation)
    recipe = recipe_of(y)
    recipe.maker.num_uses = 1
    assert torch.equal(recipe.maker.take(*recipe.tensors), y)


def test_consumers_share_one_computation():
    y = gated(*(draw(2, 3, dtype=torch.float32) for _ in range(2)), "silu")
    recipe = recipe_of(y)
    recipe.maker.num_uses = 3
    first, second, third = (recipe.maker.take(*recipe.tensors) for _ in range(3))
    assert first is second is third
    recipe.maker.num_uses = 1
    assert recipe.maker.take(*recipe.tensors) is not first


def test_what_needs_no_gradient_has_no_recipe():
    x = draw(2, 3, dtype=torch.float32).detach()
    assert recipe_of(gated(x, x, "silu")) is None
    assert recipe_of(x) is None


def test_only_inputs_are_kept():
    x, weight = draw(64, 128, dtype=torch.bfloat16), torch.ones(128).bfloat16()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        gated(rms_norm(x, weight, 1e-6, unit_offset=False), x, "silu")
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    # x, the output of the norm, the weight, and one float32 a row.
    assert sum(storages.values()) == 2 * x.nbytes + weight.nbytes + 4 * len(x)
