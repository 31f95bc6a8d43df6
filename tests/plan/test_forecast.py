"""Forecasts from few layers against simulations of the whole model."""

import pytest

import nibble
from nibble.plan.devices import find_device
from nibble.plan.forecast import Option, exact_forecast, forecaster
from nibble.plan.presets import preset_config
from nibble.plan.rows import full_rows

SHORT = {"num_hidden_layers": 9}
MODELS = {
    "llama": {**preset_config("llama-3.2-1b"), **SHORT},
    "gemma2": {**preset_config("gemma-2-2b"), "num_hidden_layers": 10},
    "falcon": {**preset_config("falcon-7b"), **SHORT},
}


POLICIES = ("none", "selective", "full", "offload")
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
        assert quick.step_seconds == pytest.approx(whole.step_seconds, rel=0.02)
        assert quick.num_trainable == whole.num_trainable
        assert quick.num_total == whole.num_total
        assert quick.host_bytes == pytest.approx(whole.host_bytes, rel=0.02)


def test_settings_are_keys_of_the_config():
    run = nibble.load_config()
    assert set(Option("lora", "none", 1).settings()) <= set(run.flat())
