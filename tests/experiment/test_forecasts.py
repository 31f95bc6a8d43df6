"""Plans of the runs of a sweep."""

from dataclasses import replace

import pytest

from nibble.errors import DataError, UsageError
from nibble.experiment import forecasts
from nibble.experiment.forecasts import PROCESS_BYTES, need_of, plan_trials
from nibble.experiment.grid import grid_trials
from nibble.plan.budget import CONTEXT_BYTES
from nibble.plan.devices import find_device

CARD = find_device("L4")


@pytest.fixture
def given(tiny_model_folder):
    return [
        *(f"model.name={tiny_model_folder('llama')}", "data.train=none", "method=lora"),
        *("data.max_seq_len=64", "train.steps=4", "train.recompute=none", "train.batch_size=1"),
    ]


@pytest.fixture(autouse=True)
def no_data(monkeypatch):
    """Plans are for full rows; counted."""
    made = []
    make_plan = forecasts.make_plan

    def counting(run, device):
        made.append(run)
        if run.data.train == "broken":
            raise DataError("nothing in it", path="broken", fix="give another")
        return make_plan(run.with_values({"data.train": ""}, "flag"), device)

    monkeypatch.setattr(forecasts, "make_plan", counting)
    return made


def test_runs_that_a_plan_cannot_tell_apart_have_one(given, no_data):
    trials = grid_trials(None, ["lora.rank=4,8", "optim.lr=1e-4,2e-4,3e-4"], given)
    planned = plan_trials(trials, CARD)
    assert len(no_data) == 2
    assert [one.trial.name for one in planned] == [trial.name for trial in trials]
    needs = [one.need.memory_bytes for one in planned]
    assert needs[0] == needs[2] < needs[3] == needs[5]
    assert needs[0] > CONTEXT_BYTES
    assert planned[0].need.host_bytes >= PROCESS_BYTES
    assert {one.run.train.micro_batch_size for one in planned} == {1}
    again = plan_trials(trials, CARD, planned[:4])
    assert len(no_data) == 3
    assert again == planned


def test_on_a_cpu_the_process_counts_as_memory_of_the_device(given):
    cpu = replace(find_device("cpu"), flops=1e12, bandwidth=1e11, host_memory_bytes=None)
    plan = forecasts.make_plan(grid_trials(None, ["lora.rank=4"], given)[0].run, cpu)[0]
    assert need_of(plan, cpu).memory_bytes == plan.needed_bytes + PROCESS_BYTES
    assert need_of(plan, cpu).host_bytes == 0


def test_what_cannot_run_carries_its_reason(given):
    tight = replace(CARD, memory_bytes=CONTEXT_BYTES + 40_000_000)
    trials = grid_trials(
        None, ["lora.rank=4,2048", "data.train=none,broken"], given[:1] + given[2:]
    )
    planned = plan_trials(trials, tight)
    assert [one.exit_code for one in planned] == [0, 65, 78, 65]
    assert "nothing in it; give another" in planned[1].reason
    assert planned[2].reason.startswith("nothing fits: lora")


def test_an_error_of_all_is_the_error(given):
    with pytest.raises(DataError, match="nothing in it"):
        plan_trials(grid_trials(None, ["data.train=broken"], given[:1]), CARD)
    with pytest.raises(UsageError, match="nowhere"):
        plan_trials(grid_trials(None, ["model.name=./nowhere"], given[1:]), CARD)
