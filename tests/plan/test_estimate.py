"""Seconds and money: rules that hold for any work, and figures known by hand."""

import doctest
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nibble.errors import UsageError
from nibble.plan import estimate
from nibble.plan.devices import DEVICES, find_device
from nibble.plan.estimate import (
    ATTENTION_EFFICIENCY,
    COPY_EFFICIENCY,
    PRODUCT_EFFICIENCY,
    Rates,
    cost,
    rates_of,
    work_seconds,
)
from nibble.plan.tracker import Operation

TERA = 10**12
RATES = Rates(flops=100e12, bandwidth=1e12, host_link=30e9, seconds_per_kernel=0.0)
KINDS = ("product", "attention", "decode", "other")
UNITS = {"s": 1, "min": 60, "h": 3600}
operations = st.builds(
    Operation, st.sampled_from(KINDS), st.integers(0, 10**16), st.integers(0, 10**13)
)
works = st.dictionaries(operations, st.integers(1, 1000), max_size=5).map(Counter)


class TestRates:
    def test_a_known_card_has_its_own(self):
        card = find_device("RTX 4090")
        rates = rates_of(card)
        assert (rates.flops, rates.bandwidth, rates.host_link) == (165.2e12, 1008e9, 31.5e9)
        assert rates.is_known

    @pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
    def test_every_card_of_the_table_is_known(self, device):
        assert rates_of(device).is_known

    @pytest.mark.parametrize("text", ["24GiB", "cpu"])
    def test_an_amount_of_memory_has_relative_ones(self, text):
        rates = rates_of(find_device(text))
        assert not rates.is_known
        assert rates.flops / rates.bandwidth == estimate.TYPICAL_FLOPS_PER_BYTE
        assert rates.seconds_per_kernel == 0.0


class TestSeconds:
    @pytest.mark.parametrize(
        ("operation", "expected"),
        [
            (Operation("product", 75 * TERA, 1), 75 / 100 / PRODUCT_EFFICIENCY),
            (Operation("attention", 40 * TERA, 1), 40 / 100 / ATTENTION_EFFICIENCY),
            (Operation("product", 1, TERA), 1 / COPY_EFFICIENCY),
            (Operation("decode", 0, TERA), 1 / COPY_EFFICIENCY),
            (Operation("other", 0, TERA), 1 / COPY_EFFICIENCY),
        ],
    )
    def test_arithmetic_or_memory_whichever_takes_longer(self, operation, expected):
        assert work_seconds(Counter([operation]), RATES) == pytest.approx(expected)

    def test_many_small_kernels_take_as_long_as_their_launches(self):
        rates = Rates(100e12, 1e12, 30e9, seconds_per_kernel=1e-3)
        small = Counter({Operation("other", 0, 1): 500})
        assert work_seconds(small, rates) == pytest.approx(0.5)
        large = Counter({Operation("other", 0, 8 * 10**11): 5})
        assert work_seconds(large, rates) == pytest.approx(5.0)

    def test_scale_grows_what_depends_on_tokens(self):
        def ratio(operation):
            work = Counter([operation])
            return work_seconds(work, RATES, scale=3.0) / work_seconds(work, RATES)

        assert ratio(Operation("other", 0, TERA)) == pytest.approx(3)
        assert ratio(Operation("product", 100 * TERA, 1)) == pytest.approx(3)
        assert ratio(Operation("attention", 100 * TERA, 1)) == pytest.approx(3)
        assert ratio(Operation("decode", 0, TERA)) == 1  # a weight is made dense once a pass
        assert ratio(Operation("product", 1, TERA)) == 1  # so is it read

    @given(works, works)
    def test_more_work_takes_longer(self, first, second):
        total = work_seconds(first + second, RATES)
        separate = work_seconds(first, RATES) + work_seconds(second, RATES)
        assert total == pytest.approx(separate)

    @given(works, st.floats(0.1, 10), st.floats(0.1, 10))
    def test_faster_devices_take_no_longer(self, work, more_flops, more_bandwidth):
        faster = Rates(
            RATES.flops * max(1, more_flops),
            RATES.bandwidth * max(1, more_bandwidth),
            RATES.host_link,
            seconds_per_kernel=0.0,
        )
        assert work_seconds(work, faster) <= work_seconds(work, RATES) * (1 + 1e-9)


class TestCost:
    @pytest.mark.parametrize(
        ("seconds", "billing", "expected"),
        [
            (3600, "1s", 2.0),
            (3601, "1s", 2.0 * 3601 / 3600),
            (3601, "1min", 2.0 * 61 / 60),
            (3601, "15min", 2.5),
            (3601, "1h", 4.0),
            (0.1, "1h", 2.0),
            (0.0, "1h", 0.0),
        ],
    )
    def test_begun_units_are_charged_whole(self, seconds, billing, expected):
        assert cost(seconds, 2.0, billing) == pytest.approx(expected)

    @given(
        st.floats(0, 1e7),
        st.decimals("0.01", 100, places=2).map(float),
        st.integers(1, 120),
        st.sampled_from(sorted(UNITS)),
    )
    def test_never_less_than_the_time_costs_nor_more_than_a_unit_above(
        self, seconds, price, number, unit
    ):
        charged = cost(seconds, price, f"{number}{unit}")
        exact = Fraction(seconds) / 3600 * Fraction(price)
        one_unit = Fraction(number * UNITS[unit], 3600) * Fraction(price)
        assert charged >= float(exact) * (1 - 1e-9)
        assert charged <= float(exact + one_unit) * (1 + 1e-9)

    @pytest.mark.parametrize("billing", ["", "15", "min", "0min", "1.5h", "1d", "-1s", "1 h", "1H"])
    def test_what_is_no_time_is_refused(self, billing):
        with pytest.raises(UsageError, match="is no time") as caught:
            cost(1.0, 1.0, billing)
        assert repr(billing) in caught.value.what
        assert "15min" in caught.value.fix


def test_examples():
    assert doctest.testmod(estimate).failed == 0
