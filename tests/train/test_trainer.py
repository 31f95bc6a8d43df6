"""Whole runs on tiny models: every family and method, stopping, continuing."""

import errno
import json
import math
import os
import signal
import time

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import nibble
from nibble.disk import faults_at, file_sha256
from nibble.errors import (
    DataError,
    DiskError,
    FolderInUseError,
    NonFiniteError,
    StoppedError,
    UsageError,
)
from nibble.events import (
    CheckpointSaved,
    EvalEnd,
    LoadEnd,
    PagesMoved,
    RunEnd,
    StepEnd,
    WarningRaised,
    read_events,
)
from nibble.train import checkpoint, course, evaluate, optimizer, trainer
from nibble.train import folder as folder_of_run
from nibble.train.replay import replay

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


def _steps(out):
    return [event.step for event in read_events(out / "events.jsonl") if isinstance(event, StepEnd)]


@pytest.mark.parametrize("bad", ["nan", "inf"])
@pytest.mark.parametrize("where", ["gradient", "weight"])
def test_what_is_no_number_stops_the_run_and_is_not_saved(
    tiny_model_folder, data, tmp_path, monkeypatch, where, bad
):
    """At the third step of six; without what spoilt it the run goes on as if never stopped."""
    settings = ("train.steps=6", "train.save_every=2", "train.micro_batch_size=3")
    folder, jobs, build_job = tiny_model_folder("llama"), [], trainer.build_job

    def keep(*arguments):
        jobs.append(build_job(*arguments))
        return jobs[-1]

    def spoil(event):
        if not isinstance(event, StepEnd) or event.step != 2 or len(jobs) > 1:
            return
        trained = [p for p in jobs[0].model.parameters() if p.requires_grad]
        if where == "weight":
            trained[5].data.view(-1)[3] = float(bad)
        else:
            trained[5].register_hook(lambda gradient: gradient * float(bad))

    monkeypatch.setattr(trainer, "build_job", keep)
    run = _run(folder, data, tmp_path / "out", *settings)
    match = "step 2: .* it was not saved" if where == "weight" else "step 3: the gradient norm"
    with pytest.raises(NonFiniteError, match=match) as error:
        nibble.train(run, spoil)
    assert error.value.exit_code == 76
    report = json.loads((tmp_path / "out" / "nonfinite.json").read_text())
    assert [sorted(each["rows"]) for each in report["passes"]] == [[0, 1, 2]]
    count = "grad_num_not_finite" if where == "gradient" else "num_not_finite"
    counts = [module[count] for module in report["passes"][0]["modules"].values()]
    assert sum(count > 0 for count in counts) == 1
    saved = sorted((tmp_path / "out" / "checkpoints").glob("step-*"))
    assert [path.name for path in saved] == ([] if where == "weight" else ["step-00000002"])
    parts = nibble.train(run)
    jobs.clear()
    whole = nibble.train(_run(folder, data, tmp_path / "whole", *settings))
    assert _digest(parts) == _digest(whole)
    assert len(_steps(tmp_path / "out")) == (8 if where == "weight" else 6)


def _digest(result):
    return file_sha256(result.adapter / "adapter_model.safetensors")


def test_a_held_out_loss_that_is_no_number_stops_the_run(
    tiny_model_folder, data, tmp_path, monkeypatch
):
    """Before the first step and after the last one; the report has the held-out rows."""
    token_metrics = evaluate.token_metrics
    run = _run(tiny_model_folder("llama"), data, tmp_path / "out")
    for step in (0, 3):
        monkeypatch.setattr(evaluate, "token_metrics", token_metrics)

        def spoil(event, step=step):
            begins = isinstance(event, LoadEnd) if step == 0 else isinstance(event, StepEnd)
            if begins and getattr(event, "step", 0) == step:
                monkeypatch.setattr(evaluate, "token_metrics", lambda *a, **k: (math.nan, 0, 1))

        with pytest.raises(NonFiniteError, match=f"step {step}: the held-out loss is nan at rows"):
            nibble.train(run, spoil)
        report = json.loads((tmp_path / "out" / "nonfinite.json").read_text())
        assert (report["step"], report["passes"]) == (step, [])
        assert report["modules"]
    monkeypatch.setattr(evaluate, "token_metrics", token_metrics)
    assert nibble.train(run).eval_loss is not None


def test_a_full_disk_ends_the_run_and_what_was_saved_stays(tiny_model_folder, data, tmp_path):
    """At any write after the first checkpoint; with space it ends as if never stopped."""
    settings = ("train.steps=4", "train.save_every=2")
    folder, points = tiny_model_folder("llama"), []
    with faults_at(lambda name, *paths: points.append(name)):
        whole = nibble.train(_run(folder, data, tmp_path / "whole", *settings))
    first = points.index("checkpoint.after_prune")
    writes = [n for n, name in enumerate(points) if n > first and name == "disk.before_write"]
    for number in writes[:: max(1, len(writes) // 4)]:
        passed = iter(range(len(points)))

        def fill(name, *paths, passed=passed, number=number):
            if next(passed) == number:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(paths[0]))

        run = _run(folder, data, tmp_path / str(number), *settings)
        with faults_at(fill), pytest.raises(DiskError, match="No space left") as error:
            nibble.train(run)
        assert error.value.exit_code == 74
        assert checkpoint.latest(tmp_path / str(number) / "checkpoints")[0].state.step >= 2
        assert _digest(nibble.train(run)) == _digest(whole)


def test_a_clock_that_jumps_changes_nothing(tiny_model_folder, data, tmp_path, monkeypatch):
    """A day ahead, a day back, past 2038: durations are of another clock, the order of none."""
    folder, settings = tiny_model_folder("llama"), ("train.save_every=1", "train.steps=4")
    plain = nibble.train(_run(folder, data, tmp_path / "plain", *settings))
    now, jumps = time.time(), iter([0, 86_400, -86_400, 2**31, -(2**30)] * 40)
    monkeypatch.setattr(time, "time", lambda: now + next(jumps))
    jumped = nibble.train(_run(folder, data, tmp_path / "jumped", *settings))
    assert _digest(jumped) == _digest(plain)
    assert checkpoint.latest(tmp_path / "jumped" / "checkpoints")[0].state.step == 4
    events = [
        e for e in read_events(tmp_path / "jumped" / "events.jsonl") if isinstance(e, StepEnd)
    ]
    assert all(0 < event.seconds < 60 for event in events)


def test_an_allowed_change_goes_on_from_the_checkpoint(tiny_model_folder, data, tmp_path):
    folder, out = tiny_model_folder("llama"), tmp_path / "out"
    nibble.train(_run(folder, data, out, "train.save_every=1"))
    longer = _run(folder, data, out, "train.save_every=1", "train.steps=5")
    with pytest.raises(FolderInUseError, match=r"train\.steps: 3 -> 5"):
        nibble.train(longer)
    with data.open("a") as file:
        file.write(json.dumps({"prompt": "say five", "completion": "five"}) + "\n")
    with pytest.raises(FolderInUseError, match=r"data: .* -> .*, rows: ") as error:
        nibble.train(longer, allow_change=["train.steps"])
    assert "--allow-change data --allow-change rows" in error.value.fix
    assert folder_of_run.read_run(out).train.steps == 3
    nibble.train(longer, allow_change=["train.steps", "data", "rows"])
    assert _steps(out) == [1, 2, 3, 4, 5]
    warnings = [
        e.message for e in read_events(out / "events.jsonl") if isinstance(e, WarningRaised)
    ]
    assert "going on with other train.steps, data, rows than the run began with" in warnings
    assert folder_of_run.read_run(out).train.steps == 5
    with pytest.raises(DataError, match=r"changed on its way \(data, rows, train.steps\)"):
        replay(out, tmp_path / "again")


def _saves(out):
    return [e.step for e in read_events(out / "events.jsonl") if isinstance(e, CheckpointSaved)]


def test_the_best_is_saved_where_that_is_cheap(tiny_model_folder, data, tmp_path, monkeypatch):
    """Every step is the best yet; of a long interval only the end must be saved."""
    monkeypatch.setattr(course, "evaluate", _better_every_time)
    settings = ("train.steps=6", "train.eval_every=1")
    for name, share, every, expected in (
        ("cheap", 0, "1h", [1, 2, 3, 4, 5, 6]),
        ("dear", 1e9, "1h", [1, 6]),
        ("asked for", 1e9, 100, [1, 2, 3, 4, 5, 6]),
    ):
        monkeypatch.setattr(course, "SAVE_PAYS_AFTER", share)
        run = _run(tiny_model_folder("llama"), data, tmp_path / name, *settings)
        nibble.train(run.with_values({"train.save_every": every}, "flag"))
        assert _saves(tmp_path / name) == expected, name


def _better_every_time(*args, step, **more):
    return EvalEnd(step, 1 / (1 + step), 1.0, 0.5, 10)


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
