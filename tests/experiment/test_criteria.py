"""How figures are written."""

import doctest

import pytest

from nibble import units
from nibble.experiment import criteria, statistics
from nibble.experiment.statistics import Estimate


@pytest.mark.parametrize("module", [criteria, statistics, units])
def test_examples_hold(module):
    found = doctest.testmod(module)
    assert found.attempted
    assert not found.failed


def test_keys_are_different_and_every_group_is_one_of_six():
    keys = [criterion.key for criterion in criteria.CRITERIA]
    assert len(keys) == len(set(keys)) == len(criteria.BY_KEY)
    assert {criterion.group for criterion in criteria.CRITERIA} < set(criteria.GROUPS)
    assert len(criteria.GROUPS) == 6


def test_a_cut_says_which_way():
    assert criteria.written(Estimate(0.3, 0.2, 0.4, 3), "cut") == "30.0 % less"
    assert criteria.written(Estimate(-2.05, -2.1, -2.0, 3), "cut") == "205.0 % more"


@pytest.mark.parametrize(
    ("half", "unit", "value", "told"),
    [
        (205.7 * 1024, "bytes", 160.5 * 2**20, "160.5 MiB ± 0.2 MiB"),
        (3.0, "bytes", 160.5 * 2**20, "160.5 MiB"),
        (0.9, "bytes", 500.0, "500 B ± 1 B"),
        (2**31, "bytes", 2**41, "2048.0 GiB ± 2.0 GiB"),
        (7.05, "seconds", 16.2, "16 s ± 7 s"),
        (0.3, "seconds", 16.2, "16 s"),
        (17.2, "seconds", 9.5, "9.500 s ± 17.200 s"),
        (0.02, "share", 0.5, "50.0 % ± 2.0 %"),
    ],
)
def test_a_spread_has_the_unit_and_digits_of_its_figure(half, unit, value, told):
    assert criteria.written(Estimate(value, value - half, value + half, 3), unit) == told


def test_one_seed_has_no_spread():
    assert criteria.written(Estimate(1.5, None, None, 1), "nats") == "1.5000"
