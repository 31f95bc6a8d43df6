"""What is chosen, and that more memory never makes it slower."""

import functools
import importlib.util
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nibble
from nibble.plan import advise as room
from nibble.plan.advise import Question, advise
from nibble.plan.budget import CONTEXT_BYTES
from nibble.plan.devices import find_device
from nibble.plan.forecast import Option, forecaster
from nibble.plan.rows import full_rows

GOLDEN = Path(__file__).parents[1] / "golden"
DECISIONS = json.loads((GOLDEN / "plan_decisions.json").read_text())
GPU = find_device("24GiB")
SMALL = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 256, "intermediate_size": 704,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


def golden_script():
    path = GOLDEN / "make_plan_decisions.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def no_history(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.mark.parametrize("case", DECISIONS)
def test_decisions_for_known_models(case):
    model, _, size = case.partition(" on ")
    assert golden_script().decide(model, int(size.split()[0])) == DECISIONS[case]


def test_the_cases_of_the_field_come_out():
    assert DECISIONS["llama-2-7b on 8 GB"]["method"] == "qlora"
    assert DECISIONS["llama-2-7b on 8 GB"]["fits"]
    assert DECISIONS["huggyllama/llama-65b on 48 GB"]["fits"]
    assert DECISIONS["llama-2-70b on 48 GB"]["fits"]
    assert DECISIONS["llama-2-7b on 80 GB"]["method"] == "lora"


NUM_EXAMPLES = 100 if os.environ.get("NIBBLE_TORTURE") == "1" else 50


def question(memory=10**11, **settings_):
    run = nibble.load_config(None, [f"{k.replace('__', '.')}={v}" for k, v in settings_.items()])
    device = replace(GPU, memory_bytes=memory)
    return Question(run, SMALL, full_rows(run), device)


@pytest.fixture(scope="module")
def shared_forecasts():
    """Forecasts do not depend on the memory: one forecaster serves every question of a run."""

    @functools.cache
    def of(length):
        asked = question(data__max_seq_len=length, train__batch_size=4)
        return forecaster(asked.run, asked.values, asked.rows, asked.device)

    return of


@pytest.mark.torture
@settings(max_examples=NUM_EXAMPLES, deadline=None)
@given(st.tuples(*[st.integers(540, 700)] * 2).map(sorted), st.sampled_from([64, 512]))
def test_more_memory_is_never_slower(shared_forecasts, pair, length):
    def chosen(megabytes):
        asked = question(megabytes * 10**6, data__max_seq_len=length, train__batch_size=4)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(room, "forecaster", lambda *a: shared_forecasts(length))
            return advise(asked)

    less, more = map(chosen, pair)
    if less.fits:
        assert more.fits
        assert more.forecast.step_seconds <= less.forecast.step_seconds


@pytest.mark.torture
@settings(max_examples=NUM_EXAMPLES, deadline=None)
@given(
    st.tuples(*[st.integers(1, 40)] * 2).map(sorted),
    st.sampled_from(["lora", "qlora"]),
    st.sampled_from(["none", "selective", "full", "offload", "tiled"]),
)
def test_longer_rows_never_need_less(shared_forecasts, pair, method, recompute):
    shorter, longer = (
        shared_forecasts(16 * length)(Option(method, recompute, 1)) for length in pair
    )
    assert shorter.needed_bytes <= longer.needed_bytes
    assert shorter.step_seconds <= longer.step_seconds


def test_pages_come_before_8_bits_and_only_when_needed():
    asked = question(train__batch_size=1, train__recompute="full", method="qlora", lora__rank=512)
    plain = advise(asked).forecast
    tight = replace(asked.device, memory_bytes=plain.needed_bytes + CONTEXT_BYTES - 1)
    paged = advise(replace(asked, device=tight)).forecast
    assert not plain.option.paged
    assert paged.option.paged
    assert paged.option.optimizer == "adamw"
    assert paged.needed_bytes < plain.needed_bytes


def test_nothing_fits_names_changes_that_would(shared_forecasts):
    short = shared_forecasts(512)(Option("qlora", "tiled", 1, embeddings="host"))
    memory = short.needed_bytes + CONTEXT_BYTES
    choice = advise(question(memory, train__batch_size=4, data__max_seq_len=2048))
    assert not choice.fits
    assert "nothing fits" in choice.reasons[0]
    assert choice.changes[0] == "data.max_seq_len=512"
    assert choice.changes[-1] == "a device with at least 1 GiB"


def test_given_settings_are_kept():
    choice = advise(question(method="lora", train__recompute="selective", train__batch_size=2))
    assert choice.forecast.option.method == "lora"
    assert choice.forecast.option.recompute == "selective"
    assert choice.runner_up is None
    assert choice.reasons[0].startswith("lora was asked for")


def test_a_pass_of_the_users_that_is_too_large_is_given_back_to_the_planner():
    one_row = advise(question(train__recompute="none", train__batch_size=16, method="lora"))
    asked = question(
        one_row.forecast.needed_bytes + CONTEXT_BYTES,
        train__recompute="none", train__batch_size=16, train__micro_batch_size=16, method="lora",
    )  # fmt: skip
    choice = advise(asked)
    assert not choice.fits
    assert choice.forecast.option.micro_batch_size == 16
    assert "16 rows a pass" in choice.reasons[0]
    assert choice.changes[0] == "train.micro_batch_size=auto"


def test_host_memory_is_part_of_what_has_to_fit():
    asked = question(method="lora", train__recompute="offload", train__micro_batch_size=1)
    needed = advise(asked).forecast.host_bytes
    assert needed > 0

    def with_host(num_bytes):
        return advise(replace(asked, device=replace(asked.device, host_memory_bytes=num_bytes)))

    assert with_host(needed).fits
    short = with_host(needed - 1)
    assert not short.fits
    assert "of host memory, this machine has" in short.reasons[0]
    assert not any("a device" in change for change in short.changes)


def test_the_device_that_is_named_would_do():
    asked = question(560 * 10**6, data__max_seq_len=4096)
    choice = advise(asked)
    assert not choice.fits
    [named] = [change for change in choice.changes if "a device" in change]
    gibibytes = int(named.split()[-2])
    larger = replace(asked.device, memory_bytes=gibibytes * 2**30)
    assert advise(replace(asked, device=larger)).fits


def test_rates_that_are_assumed_are_named():
    known = replace(question(), device=replace(find_device("RTX 4090"), memory_bytes=10**11))
    unknown = advise(question(train__micro_batch_size=1, train__batch_size=1))
    said = [sentence for sentence in unknown.reasons if "would be" in sentence]
    assert said
    assert all("at the rates of a usual card" in s or "as fast" in s for s in said)
    assert not any("of a usual card" in sentence for sentence in advise(known).reasons)


def test_a_step_of_few_rows_takes_less():
    run = question(train__batch_size=16)
    few = replace(run, rows=replace(run.rows, num_rows=2, worst={1: (2048,), 2: (2048,) * 2}))
    assert advise(few).forecast.step_seconds < advise(run).forecast.step_seconds / 4
    assert any(" of the 2 rows" in reason for reason in advise(few).reasons)
