"""Exact means the same bits or an error, never something else in silence."""

import os

import pytest
import torch

from nibble.errors import UnavailableError
from nibble.train.exact import LEVELS, check_environment, exactness, threads_of


def test_within_the_block_only_deterministic_operations(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    for level, expected in (("exact", True), ("default", False)):
        with exactness(level):
            assert torch.are_deterministic_algorithms_enabled() is expected
        assert not torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_what_has_no_deterministic_way_is_refused():
    """As torch says it, with what a person can do."""
    with (
        pytest.raises(UnavailableError, match="exact: kthvalue CUDA does") as error,
        exactness("exact"),
    ):
        raise RuntimeError("kthvalue CUDA does not have a deterministic implementation\nmore")
    assert error.value.exit_code == 69
    assert "train.exactness=default" in error.value.fix


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="shapes"), exactness("exact"):
        raise RuntimeError("shapes do not fit")
    with pytest.raises(RuntimeError, match="deterministic"), exactness("default"):
        raise RuntimeError("does not have a deterministic implementation")


HUGE = ({"threads": "9" * 20}, {"threads": "9" * 5000})


def test_threads_are_those_the_run_began_with():
    before = torch.get_num_threads()
    with threads_of({"threads": "3"}):
        assert torch.get_num_threads() == 3
        for nothing in (
            {},
            {"threads": "x"},
            {"threads": "0"},
            {"threads": "-1"},
            {"threads": "\u00b2"},
            *HUGE,
        ):
            with threads_of(nothing):
                assert torch.get_num_threads() == 3
    assert torch.get_num_threads() == before


def test_another_environment_is_refused_or_said():
    began, now = {"torch": "2.11", "device": "cpu"}, {"torch": "2.13", "device": "cpu"}
    with pytest.raises(UnavailableError, match=r"torch: 2\.11 -> 2\.13"):
        check_environment("exact", began, now)
    assert "torch: 2.11 -> 2.13" in check_environment("default", began, now)
    for level in LEVELS:
        assert check_environment(level, now, now) == ""
    assert check_environment("default", {}, now) == ""
    with pytest.raises(UnavailableError, match="is not known"):
        check_environment("exact", {}, now)
