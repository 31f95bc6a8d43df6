"""Whole runs on tiny models: every family and method, stopping, continuing."""

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import nibble
from nibble.errors import DataError, StoppedError, UsageError
from nibble.events import EvalEnd, LoadEnd, PagesMoved, RunEnd, StepEnd, read_events
from nibble.train import optimizer

peft = pytest.importorskip("peft")
FAMILIES = (
    "llama",
    "mistral",
    "falcon-7b",
    "falcon-40b",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3",
    "phi3",
    "mixtral",
    "qwen3_moe",
)


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "train.jsonl"
    rows = [
        {"prompt": f"say {word}", "completion": word} for word in ["one", "two", "three", "four"]
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows * 2))
    return path


def _run(folder, data, out, *more, method="lora"):
    settings = [
        f"model.name={folder}",
        f"data.train={data}",
        f"data.eval={data}",
        f"out={out}",
        f"method={method}",
        "data.max_seq_len=128",
        "train.batch_size=8",
        # Left to the planner it would depend on how fast this machine happens to be.
        "train.micro_batch_size=4",
        "train.steps=3",
        "lora.rank=4",
        "optim.lr=1e-2",
        "optim.warmup=0",
        "model.dtype=float32",
    ]
    return nibble.load_config(None, [*settings, *more])


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_three_steps_of_every_family(tiny_model_folder, data, tmp_path, family, method):
    folder = tiny_model_folder(family)
    result = nibble.train(_run(folder, data, tmp_path / "out", method=method))
    events = list(read_events(result.out / "events.jsonl"))
    losses = [event.loss for event in events if isinstance(event, StepEnd)]
    assert losses[2] < losses[0]
    load = next(event for event in events if isinstance(event, LoadEnd))
    assert sum(load.resident_bytes.values()) == load.total_bytes
    if method == "qlora":
        wide = {kind for kind in load.resident_bytes if kind.startswith(("float", "bfloat"))}
        assert not any("linear" in kind or "expert" in kind for kind in wide), wide
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    peft.PeftModel.from_pretrained(base, result.adapter)


def test_full_fine_tuning_writes_a_model(tiny_model_folder, data, tmp_path):
    run = _run(tiny_model_folder("llama"), data, tmp_path / "out", method="full")
    result = nibble.train(run.with_values({"model.dtype": "bfloat16"}, "flag"))
    evals = [e for e in read_events(result.out / "events.jsonl") if isinstance(e, EvalEnd)]
    assert evals[-1].loss < evals[0].loss
    assert AutoModelForCausalLM.from_pretrained(result.adapter).dtype == torch.bfloat16


def test_run_folder_and_a_second_call(tiny_model_folder, data, tmp_path):
    run = _run(tiny_model_folder("llama"), data, tmp_path / "out")
    result = nibble.train(run)
    assert {p.name for p in result.out.iterdir()} >= {
        "run.yaml",
        "events.jsonl",
        "metrics.csv",
        "manifest.json",
        "checkpoints",
        "adapter",
    }
    before = (result.adapter / "adapter_model.safetensors").stat().st_mtime_ns
    assert nibble.train(run) == result
    assert (result.adapter / "adapter_model.safetensors").stat().st_mtime_ns == before
    assert result.eval_loss is not None
    assert result.final_loss > 0


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_stopped_and_continued_equals_uninterrupted(tiny_model_folder, data, tmp_path, method):
    settings = ("train.steps=6", "lora.dropout=0.1", "train.micro_batch_size=3")
    folder = tiny_model_folder("llama")

    def stop_after_two(event):
        if isinstance(event, StepEnd) and event.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    whole = nibble.train(_run(folder, data, tmp_path / "whole", *settings, method=method))
    run = _run(folder, data, tmp_path / "parts", *settings, method=method)
    with pytest.raises(StoppedError, match="step 2 of 6 is saved"):
        nibble.train(run, stop_after_two)
    parts = nibble.train(run)
    first, second = (load_file(r.adapter / "adapter_model.safetensors") for r in (whole, parts))
    assert all(torch.equal(first[key], second[key]) for key in first)
    steps = [e.step for e in read_events(parts.out / "events.jsonl") if isinstance(e, StepEnd)]
    assert steps == [1, 2, 3, 4, 5, 6]
    ends = [e.reason for e in read_events(parts.out / "events.jsonl") if isinstance(e, RunEnd)]
    assert ends == ["stopped by SIGTERM; step 2 of 6 is saved", "finished"]


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_least_memory(tiny_model_folder, data, tmp_path, monkeypatch, method):
    """8-bit moments in pages and layer inputs in host memory, all at once."""
    monkeypatch.setattr(optimizer, "PAGE_BYTES_PER_BIT", 130)
    folder, results = tiny_model_folder("llama"), {}
    least = ("optim.name=adamw8bit", "train.recompute=offload")
    for name, settings in {
        "paged": (*least, "optim.paged=true"),
        "resident": (*least, "optim.paged=false"),
        "wide": (),
    }.items():
        run = _run(folder, data, tmp_path / name, *settings, method=method)
        results[name] = nibble.train(run)
    paged, resident, wide = (results[name].final_loss for name in ("paged", "resident", "wide"))
    assert paged == resident
    assert paged == pytest.approx(wide, rel=0.02)
    files = [next(results[name].adapter.glob("*.safetensors")) for name in ("paged", "resident")]
    first, second = (load_file(file) for file in files)
    assert all(torch.equal(first[key], second[key]) for key in first)
    moved, none = (
        [e for e in read_events(results[name].out / "events.jsonl") if isinstance(e, PagesMoved)]
        for name in ("paged", "resident")
    )
    assert [(e.step, e.pages_in == e.pages_out > 0, e.bytes_moved > 0) for e in moved] == [
        (3, True, True)
    ]
    assert none == []


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.train=''", "data.train is not set"),
    ],
)
def test_what_is_not_there_is_refused(tiny_model_folder, data, tmp_path, override, message):
    run = _run(tiny_model_folder("llama"), data, tmp_path / "out", override)
    with pytest.raises(UsageError, match=message):
        nibble.train(run)
    assert not (tmp_path / "out").exists()


def test_empty_data(tiny_model_folder, data, tmp_path):
    data.write_text("")
    with pytest.raises(DataError, match="empty"):
        nibble.train(_run(tiny_model_folder("llama"), data, tmp_path / "out"))
