"""The simple rules for `auto`."""

import pytest

from nibble.config import load_config
from nibble.plan import resolve as module
from nibble.plan.resolve import resolve


@pytest.mark.parametrize(("free", "method"), [(10**9, "lora"), (100_000, "qlora")])
def test_method_follows_memory(tiny_model_folder, monkeypatch, free, method):
    monkeypatch.setattr(module, "available_bytes", lambda device: free)
    run, reasons = resolve(load_config(None, [f"model.name={tiny_model_folder('llama')}"]))
    assert run.method == method
    assert reasons[0].startswith(f"{method}: the base takes")
    assert "auto" not in [v for k, v in run.flat().items() if k != "data.format"]
    assert run.origin("train.recompute") == "planner"


def test_recompute_when_activations_do_not_fit(tiny_model_folder, monkeypatch):
    monkeypatch.setattr(module, "available_bytes", lambda device: 3_000_000)
    run = load_config(None, [f"model.name={tiny_model_folder('llama')}", "method=qlora"])
    assert resolve(run)[0].train.recompute == "full"


def test_what_is_set_stays(tiny_model_folder):
    run = load_config(
        None,
        [
            f"model.name={tiny_model_folder('llama')}",
            "method=qlora",
            "train.micro_batch_size=3",
            "train.recompute=selective",
            "optim.paged=false",
        ],
    )
    assert resolve(run) == (run, [])


def test_micro_batch_holds_about_4096_tokens(tiny_model_folder):
    run = load_config(
        None, [f"model.name={tiny_model_folder('llama')}", "method=lora", "data.max_seq_len=1024"]
    )
    assert resolve(run)[0].train.micro_batch_size == 4
