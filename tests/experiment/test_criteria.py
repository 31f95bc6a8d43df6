"""How figures are written."""

import doctest

import pytest

from nibble.experiment import criteria, statistics
from nibble.experiment.statistics import Estimate


@pytest.mark.parametrize("module", [criteria, statistics])
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


def test_one_seed_has_no_spread():
    assert criteria.written(Estimate(1.5, None, None, 1), "nats") == "1.5000"
