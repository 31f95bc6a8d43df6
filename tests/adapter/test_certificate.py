"""Bounds of a certificate, and what it says."""

import json

import pytest

from nibble.adapter.agreement import Agreement
from nibble.adapter.certificate import Certificate, Measured
from nibble.adapter.rounding import Rounding

KEPT = Rounding(update=1.0, error=0.0, step=0.1, along=1.0, num_values=4)
LOST = Rounding(update=1.0, error=1.0, step=9.0, along=0.0, num_values=4)


def _certificate(*, is_same_base, loss=2.0, kl=1e-4, live=2.0, base=3.0, rounding=KEPT):
    measured = Measured(base, live, Agreement(100, loss, kl, 10 * kl, 0.99))
    onto = "16bit" if is_same_base else "4bit"
    return Certificate("a", "b", onto, "bf16", is_same_base, rounding, measured)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"is_same_base": True}, ""),
        ({"is_same_base": True, "loss": 2.003}, ""),
        ({"is_same_base": True, "loss": 2.005}, "rises by 0.25 %"),
        ({"is_same_base": True, "kl": 2e-3}, "mean KL is 2.0e-03"),
        ({"is_same_base": True, "loss": float("nan")}, "rises by nan"),
        ({"is_same_base": True, "kl": float("nan")}, "mean KL is nan"),
        ({"is_same_base": False, "kl": 0.5}, ""),
        ({"is_same_base": False, "loss": 2.05}, "rises by 2.50 %"),
        ({"is_same_base": False, "loss": 2.03, "base": 2.1}, "70 % of what the adapter gained"),
        ({"is_same_base": False, "loss": 1.9}, ""),
        ({"is_same_base": False, "live": 2.0, "base": 1.9}, ""),
        ({"is_same_base": True, "rounding": LOST}, "loses the update"),
    ],
)
def test_bounds(values, problem):
    found = _certificate(**values)
    assert bool(found.problems) == bool(problem)
    assert problem in "".join(found.problems)
    assert found.to_dict()["passed"] == (not problem)


def test_what_is_written_is_json_and_says_what_was_not_measured():
    bare = Certificate("a", "b", "dequantized", "nf4", True, KEPT)
    values = json.loads(json.dumps(bare.to_dict()))
    assert (values["version"], values["measured"], values["passed"]) == (1, None, True)
    assert "not measured" in bare.sentence()


def test_the_sentence_has_the_losses():
    assert (
        "held-out loss 2.0000 (adapter 2.0000, base 3.0000)"
        in _certificate(is_same_base=True).sentence()
    )
