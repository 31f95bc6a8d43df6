"""The figures of rounding, against plain formulas."""

import math

import pytest
import torch

from nibble.adapter.rounding import Rounding
from nibble.kernels.nf4 import quantize


def test_sums_are_those_of_the_formulas():
    generator = torch.Generator().manual_seed(0)
    base, update, written = (torch.randn(6, 5, generator=generator) for _ in range(3))
    rounding = Rounding()
    for rows in (slice(0, 2), slice(2, 6)):
        rounding.add(written[rows].clone(), base[rows].clone(), update[rows])
    change = written - base
    assert rounding.kept == pytest.approx(float((change * update).sum() / update.square().sum()))
    assert rounding.rms("update") == pytest.approx(float(update.square().mean().sqrt()))
    error = (change - update).square().mean().sqrt()
    assert rounding.rms("error") == pytest.approx(float(error))


def test_two_sums_add_up():
    one, other = Rounding(1.0, 2.0, 3.0, 4.0, 5), Rounding(10.0, 20.0, 30.0, 40.0, 50)
    one += other
    assert one == Rounding(11.0, 22.0, 33.0, 44.0, 55)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("value", [1.0, 1.5, 3.0, 0.3])
def test_the_step_is_the_distance_to_the_next_value(dtype, value):
    tensor = torch.tensor([value], dtype=dtype)
    following = torch.nextafter(tensor, torch.tensor([math.inf], dtype=dtype))
    rounding = Rounding(num_values=1)
    rounding.add_dense_step(tensor)
    assert rounding.rms("step") == float(following.float() - tensor.float())


def test_the_step_in_4_bits_is_that_of_the_scales():
    q = quantize(torch.cat([torch.full((64,), 3.0), torch.full((64,), 1.0)]), double=False)
    rounding = Rounding(num_values=128)
    rounding.add_quantized_step(q)
    assert rounding.rms("step") == pytest.approx(2 / 15 * math.sqrt((9 + 1) / 2))


@pytest.mark.parametrize(
    ("written", "is_lost"),
    [("update", False), ("nothing", True), ("noise", True), ("half", False)],
)
def test_an_update_is_lost_if_it_is_gone_or_covered(written, is_lost):
    generator = torch.Generator().manual_seed(0)
    base, update = torch.zeros(64, 64), torch.randn(64, 64, generator=generator)
    noise = 3 * torch.randn(64, 64, generator=generator)
    found = {
        "update": update,
        "nothing": base,
        "noise": update + noise,
        "half": 0.6 * update,
    }
    rounding = Rounding()
    rounding.add(found[written].clone(), base.clone(), update)
    assert rounding.is_lost == is_lost


def test_no_update_loses_nothing():
    assert Rounding().kept == 1
    assert not Rounding().is_lost
