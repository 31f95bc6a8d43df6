"""Forecasts from few layers against simulations of the whole model."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import nibble
from nibble.plan.devices import find_device
from nibble.plan.forecast import (
    MOST_LENGTHS,
    Option,
    exact_forecast,
    few_lengths,
    forecaster,
)
from nibble.plan.presets import preset_config
from nibble.plan.rows import full_rows

SHORT = {"num_hidden_layers": 9}
MODELS = {
    "llama": {**preset_config("llama-3.2-1b"), **SHORT},
    "gemma2": {**preset_config("gemma-2-2b"), "num_hidden_layers": 10},
    "falcon": {**preset_config("falcon-7b"), **SHORT},
}


POLICIES = ("none", "selective", "full", "offload", "tiled")
CASES = [(model, recompute, "RTX 4090") for model in MODELS for recompute in POLICIES]


@pytest.mark.parametrize(
    ("model", "recompute", "device"), [*CASES, ("llama", "none", "cpu"), ("llama", "full", "cpu")]
)
def test_few_layers_tell_the_whole(model, recompute, device):
    run = nibble.load_config(None, ["data.max_seq_len=512", "train.batch_size=2"])
    rows, found = full_rows(run), find_device(device)
    forecasts = [make(run, MODELS[model], rows, found) for make in (forecaster, exact_forecast)]
    for method, size in (("lora", 1), ("qlora", 2)):
        quick, whole = (make(Option(method, recompute, size)) for make in forecasts)
        assert quick.peak_bytes == pytest.approx(whole.peak_bytes, rel=0.005)
        # The time of more rows is no line: see below.
        bound = 0.02 if size == 1 else 0.08
        assert quick.step_seconds == pytest.approx(whole.step_seconds, rel=bound)
        assert quick.num_trainable == whole.num_trainable
        assert quick.num_total == whole.num_total
        assert quick.host_bytes == pytest.approx(whole.host_bytes, rel=0.02)


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
@pytest.mark.parametrize("length", [64, 1024])
@pytest.mark.parametrize("recompute", ["none", "full", "offload"])
def test_rows_between_the_fewest_and_the_most(method, length, recompute):
    run = nibble.load_config(
        None, [f"method={method}", f"data.max_seq_len={length}", "train.batch_size=16"]
    )
    rows, found = full_rows(run), find_device("RTX 4090")
    quick, whole = (
        make(run, MODELS["llama"], rows, found) for make in (forecaster, exact_forecast)
    )
    for size in (1, 4, 16):
        ours, exact = (make(Option(method, recompute, size)) for make in (quick, whole))
        # Of a full fine-tune other moments are the highest with many layers than with few.
        bound = 0.03 if method == "full" else 0.01
        assert ours.peak_bytes == pytest.approx(exact.peak_bytes, rel=bound)
        # Small products are limited by memory, larger ones by arithmetic: time is no line.
        assert ours.step_seconds == pytest.approx(exact.step_seconds, rel=0.08)


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=60))
def test_few_lengths_keep_documents_and_tokens(documents):
    found = few_lengths(tuple(documents))
    assert (len(found), sum(found)) == (len(documents), sum(documents))
    assert len(set(found)) <= 2 * MOST_LENGTHS
    assert max(found) <= max(documents)


def test_settings_are_keys_of_the_config():
    run = nibble.load_config()
    assert set(Option("lora", "none", 1).settings()) <= set(run.flat())
