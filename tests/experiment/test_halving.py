"""Who goes on at a rung, by losses alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nibble.errors import UsageError
from nibble.experiment.grid import grid_trials
from nibble.experiment.halving import decide, with_rungs

GIVEN = ["model.name=m", "data.train=d"]
losses = st.lists(st.tuples(*[st.floats(0, 9)] * 2), min_size=1, max_size=9)


@given(losses, st.data())
def test_the_verdict_needs_no_order(values, data):
    """Whatever comes first, nobody is judged before all have come, and the end is the same."""
    names = [str(number) for number in range(len(values))]
    known = {name: {0: 9.9} for name in names}
    told = decide(known, [5, 10])
    assert (told.lost, told.rung) == ({}, 5)
    for rung, which in ((5, 0), (10, 1)):
        before = decide(known, [5, 10])
        alive = [name for name in names if name not in before.lost]
        for name in data.draw(st.permutations(alive)):
            assert decide(known, [5, 10]) == before
            known[name][rung] = values[int(name)][which]
    told = decide(known, [5, 10])
    first = sorted(names, key=lambda n: values[int(n)][0])[: (len(names) + 1) // 2]
    last = sorted(sorted(first, key=int), key=lambda n: values[int(n)][1])[: (len(first) + 1) // 2]
    assert told.rung is None
    assert set(names) - set(told.lost) == set(last)
    assert {name for name, rung in told.lost.items() if rung == 5} == set(names) - set(first)


def test_nobody_waits_for_a_run_that_failed():
    known = {"a": {0: 3.0, 5: 2.0}, "b": {0: 3.0}, "c": {0: 3.0, 5: 1.0}}
    assert decide(known, [5]).rung == 5
    assert decide(known, [5], failed={"b"}).lost == {"a": 5}


def test_rungs_are_at_evaluations():
    trials = grid_trials(None, ["lora.rank=4,8"], [*GIVEN, "data.eval=0.1", "train.steps=40"])
    found, rungs = with_rungs(trials)
    assert rungs == [10, 20]
    assert {trial.run.train.eval_every for trial in found} == {10}
    every = [*GIVEN, "data.eval=0.1", "train.steps=40", "train.eval_every=7"]
    assert with_rungs(grid_trials(None, ["lora.rank=4,8"], every))[1] == [7, 14]


@pytest.mark.parametrize(
    ("axis", "more", "message"),
    [
        ("lora.rank=4", ["data.eval=0.1", "train.steps=8"], "two runs or more"),
        ("lora.rank=4,8", ["train.steps=8"], "data.eval of run-1 is not set"),
        ("lora.rank=4,8", ["data.eval=0.1"], "needs train.steps"),
        ("train.steps=8,16", ["data.eval=0.1"], "the same train.steps"),
        ("lora.rank=4,8", ["data.eval=0.1", "train.steps=8", "train.eval_every=5"], "before half"),
    ],
)
def test_what_cannot_be_halved_is_refused(axis, more, message):
    with pytest.raises(UsageError, match=message):
        with_rungs(grid_trials(None, [axis], [*GIVEN, *more]))
