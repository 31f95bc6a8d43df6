"""The runs of a sweep, and what is refused before any starts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nibble.errors import UsageError
from nibble.experiment.grid import grid_trials, listed_trials, said, split_values

GIVEN = ["model.name=m", "data.train=d"]
HUNDRED = ",".join(map(str, range(1, 102)))
words = st.text("abc=./-'", max_size=5).filter(lambda word: not word.startswith("'"))
values = st.one_of(
    words,
    st.lists(words.map(lambda word: word.replace("'", "")), max_size=3).map(
        lambda items: f"[{','.join(items)}]"
    ),
    st.text("abc,[ ", max_size=5).map(lambda text: f'"{text}"'),
)


@given(st.lists(values, min_size=1))
def test_values_are_parted_by_commas_outside_of_brackets_and_quotes(pieces):
    assert split_values(",".join(pieces)) == pieces


def test_a_grid_is_every_combination_the_last_key_fastest():
    axes = ["optim.lr=1e-4,2e-4", "lora.target=all-linear,[q_proj,v_proj]"]
    trials = grid_trials(None, axes, [*GIVEN, "lora.rank=8"])
    assert [trial.name for trial in trials] == ["run-1", "run-2", "run-3", "run-4"]
    assert [said(trial.settings) for trial in trials[:2]] == [
        "optim.lr=0.0001 lora.target=all-linear",
        'optim.lr=0.0001 lora.target=["q_proj", "v_proj"]',
    ]
    assert {trial.run.lora.rank for trial in trials} == {8}
    assert trials[3].run.optim.lr == 2e-4
    assert trials[3].run.origin("optim.lr") == "flag"


def test_names_sort_as_the_runs_do():
    trials = grid_trials(None, ["train.seed=" + ",".join(map(str, range(12)))], GIVEN)
    names = [trial.name for trial in trials]
    assert (names[0], names[-1]) == ("run-01", "run-12")
    assert names == sorted(names)


def test_a_list_has_a_run_an_item(tmp_path):
    path = tmp_path / "runs.yaml"
    path.write_text("- {optim.lr: 1e-4, lora.rank: 4}\n- lora.rank: 8\n")
    first, second = listed_trials(None, path, GIVEN)
    assert first.settings == {"optim.lr": 1e-4, "lora.rank": 4}
    assert (second.run.lora.rank, second.run.optim.lr) == (8, 2e-4)


@pytest.mark.parametrize(
    ("axes", "more", "message"),
    [
        ([], [], "nothing to sweep over"),
        (["optim.lr"], [], "not of the form key=v1,v2"),
        (["=1"], [], "not of the form"),
        (["optim.lr="], [], "empty value"),
        (["optim.lr=1e-4,,2e-4"], [], "empty value"),
        (["optim.lrr=1e-4,2e-4"], [], 'did you mean "optim.lr"'),
        (["optim=1,2"], [], "is a section"),
        (["lora.rank=4,four"], [], "lora.rank.*valid integer"),
        (["lora.rank=4,0"], [], "greater than or equal to 1"),
        (["out=a,b"], [], "out is the folder of a run"),
        (["lora.rank=4,8"], ["out=a"], "--set out does nothing"),
        (["lora.rank=4,8", "lora.rank=2,16"], [], "stands twice"),
        (["lora.rank=4,8"], ["lora.rank=2"], "in --grid and in --set"),
        (["lora.rank=8,8"], [], "run-1 .* and run-2 .* are the same run"),
        (["optim.lr=1e-4,0.0001"], [], "are the same run"),
        (["train.batch_size=1,4"], ["train.micro_batch_size=4"], "run-1 .train.batch_size=1.: "),
        ([f"{key}={HUNDRED}" for key in ("lora.rank", "lora.alpha")], [], "more than 10,000 runs"),
    ],
)  # fmt: skip
def test_wrong_grids_are_refused(axes, more, message):
    with pytest.raises(UsageError, match=message):
        grid_trials(None, axes, [*GIVEN, *more])


@pytest.mark.parametrize(
    ("text", "more", "message"),
    [
        ("", [], "nothing to sweep over"),
        ("lora.rank: 8\n", [], "expected a list"),
        ("- 8\n", [], "item 1 is 8"),
        ("- {}\n", [], "item 1"),
        ("- {lora.rank: 8}\n- {lora.rnk: 8}\n", [], 'item 2: .*did you mean "lora.rank"'),
        ("- {out: a}\n", [], "item 1: out is the folder"),
        ("- {lora.rank: 8}\n", ["lora.rank=4"], "--set too"),
        ("- {lora.rank: 8}\n- {lora.rank: 8}\n", [], "the same run"),
        ("- [\n", [], "not valid YAML"),
    ],
)
def test_wrong_lists_are_refused(tmp_path, text, more, message):
    path = tmp_path / "runs.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        listed_trials(None, path, [*GIVEN, *more])
