"""Student's interval and differences by pairs."""

import math
from statistics import NormalDist

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nibble.experiment.statistics import difference, estimate, proportion, t_mass, t_quantile

# Source: any printed table of Student's distribution, two-sided 95 %.
TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 10: 2.228, 30: 2.042}

values = st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=12)


@pytest.mark.parametrize(("degrees", "t"), TABLE.items())
def test_quantiles_are_those_of_printed_tables(degrees, t):
    assert t_quantile(degrees) == pytest.approx(t, abs=5e-4)


def test_many_degrees_are_the_normal_distribution():
    assert t_quantile(100_000) == pytest.approx(NormalDist().inv_cdf(0.975), abs=1e-4)


@given(st.integers(1, 40), st.floats(0, 50))
def test_the_mass_is_the_integral_of_the_density(degrees, t):
    scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2))
    scale /= math.sqrt(degrees * math.pi)
    steps = 4000
    width = t / steps
    total = sum(
        (1 + ((number + 0.5) * width) ** 2 / degrees) ** (-(degrees + 1) / 2)
        for number in range(steps)
    )
    assert t_mass(t, degrees) == pytest.approx(2 * scale * total * width, abs=1e-4)


@given(values, st.floats(-1e3, 1e3))
def test_an_interval_moves_with_its_values(sample, shift):
    one, other = estimate(sample), estimate([value + shift for value in sample])
    assert other.value == pytest.approx(one.value + shift, abs=1e-6)
    assert other.half_width == pytest.approx(one.half_width, rel=1e-6, abs=1e-6)
    assert one.low <= one.value <= one.high


def test_one_value_has_no_interval_and_tells_nothing():
    one = estimate([3.0])
    assert (one.value, one.low, one.high, one.half_width) == (3.0, None, None, None)
    assert not one.is_apart_from_0
    assert estimate([]) is None


def test_what_a_seed_brings_cancels_out():
    theirs = {0: 1.0, 1: 5.0, 2: 9.0}
    ours = {0: 1.5, 1: 5.6, 2: 9.4, 7: 100.0}
    told = difference(ours, theirs)
    assert told.num_values == 3
    assert told.value == pytest.approx(0.5)
    assert told.is_apart_from_0
    assert not estimate(
        [o - t for o, t in zip([1.5, 9.4, 5.6], theirs.values(), strict=True)]
    ).is_apart_from_0
    assert difference({0: 1.0}, {1: 1.0}) is None


# Source: Wilson's formula worked by hand with z = 1.959964.
SHARES = {(0, 10): (0.0, 0.2775), (5, 10): (0.2366, 0.7634), (10, 10): (0.7225, 1.0)}


@pytest.mark.parametrize(("counts", "ends"), SHARES.items())
def test_the_interval_of_a_share(counts, ends):
    found = proportion(*counts)
    assert (found.low, found.high) == pytest.approx(ends, abs=1e-4)
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert proportion(0, 0) is None
