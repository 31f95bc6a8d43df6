"""`nibble compare` as a person uses it: real runs of a tiny model."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from nibble.commands.main import main
from nibble.experiment import engine, project
from nibble.experiment.compare import Progress, Record, read_comparison

METHODS = ("lora", "qlora", "full")
DECIDED = (
    "train.batch_size=4", "train.micro_batch_size=4", "data.max_seq_len=64", "optim.paged=false",
    "train.recompute=none",
)  # fmt: skip


@pytest.fixture
def call(tiny_model_folder, tmp_path, capsys, monkeypatch):
    """Runs the command on a tiny model and a few rows; gives exit code, output and errors."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(project, "SHOWN", ("T4",))
    for name, numbers in (("train", range(12)), ("eval", range(12, 16))):
        rows = [{"prompt": f"say {n}", "completion": f"{n}"} for n in numbers]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(*words, model=None, out="out"):
        with pytest.raises(SystemExit) as stop:
            main(["compare", *arguments(*words, model=model, out=out)])
        shown, errors = capsys.readouterr()
        assert "Traceback" not in errors
        return stop.value.code, shown, errors

    def arguments(*words, model=None, out="out"):
        given = [f"--model={model or tiny_model_folder('llama')}", f"--out={tmp_path / out}"]
        given += [f"--data={tmp_path / 'train.jsonl'}", f"--eval-data={tmp_path / 'eval.jsonl'}"]
        return [*given, *(f"--set={setting}" for setting in DECIDED), *words]

    run.arguments = arguments
    return run


def logged(out, name):
    """The events of a run as they stand in its log."""
    return [json.loads(line) for line in (out / name / "events.jsonl").read_text().splitlines()]


def of(events, name):
    return [event for event in events if event["event"] == name]


def expected(out, method, seeds):
    """Means of what stands in the logs of the runs, computed here anew."""
    logs = [logged(out, f"{method}-seed{seed}") for seed in seeds]
    ends = [of(log, "run_end")[-1] for log in logs]
    loads = [of(log, "load_end")[-1] for log in logs]
    evals = [of(log, "eval") for log in logs]
    adapters = [
        sum(size for kind, size in load["resident_bytes"].items() if kind.endswith("adapters"))
        for load in loads
    ]
    steps = [sorted(step["seconds"] for step in of(log, "step")) for log in logs]
    bases = [load["total_bytes"] - own for load, own in zip(loads, adapters, strict=True)]
    each = {
        "base_bytes": bases,
        "saved_bytes": [end["adapter_bytes"] for end in ends],
        "saved_share": [e["adapter_bytes"] / b for e, b in zip(ends, bases, strict=True)],
        "setup_seconds": [load["seconds"] for load in loads],
        "step_seconds": [seconds[len(seconds) // 2] for seconds in steps],
        "train_seconds": [end["seconds"] for end in ends],
        "tokens_per_s": [end["tokens"] / end["seconds"] for end in ends],
        "peak_memory_bytes": [end["peak_memory_bytes"] for end in ends],
        "predicted_peak_memory_bytes": [end["predicted_peak_memory_bytes"] for end in ends],
        "eval_loss_before": [found[0]["loss"] for found in evals],
        "eval_loss": [found[-1]["loss"] for found in evals],
        "token_accuracy": [found[-1]["token_accuracy"] for found in evals],
    }
    return {key: sum(values) / len(values) for key, values in each.items()}


def test_from_start_to_end_and_again(call, tmp_path, monkeypatch):
    out, words = tmp_path / "out", ("--seeds=2", "--set=train.steps=3", "--json")
    code, shown, errors = call(*words)
    assert code == 0, errors
    report = json.loads(shown)
    assert report == json.loads((out / "report.json").read_text())
    assert (report["version"], list(report["methods"])) == (1, list(METHODS))
    for method in METHODS:
        found = report["methods"][method]
        assert found["status"]["value"] == "finished"
        for key, mean in expected(out, method, (0, 1)).items():
            assert found[key]["value"] == pytest.approx(mean, rel=1e-12), (method, key)
            assert found[key]["low"] <= found[key]["value"] <= found[key]["high"]
        assert found["total_seconds"]["value"] > found["train_seconds"]["value"]
        assert found["exact_match"]["value"] is not None
        assert found["smallest_device"]["value"]
    qlora, lora = (report["methods"][m]["base_bytes"]["value"] for m in ("qlora", "lora"))
    assert qlora < lora
    names = {path.name for path in out.iterdir()}
    assert names >= {"report.html", "report.md", "loss.png", "memory.png", "speed.png"}
    assert errors.count("begins") == 6

    # Again: nothing is run, the report is written anew, and it is the same.
    for name in ("report.html", "report.json"):
        (out / name).unlink()
    monkeypatch.setattr(engine, "start", lambda *a, **k: pytest.fail("a run was begun"))
    code, again, errors = call(*words)
    assert (code, json.loads(again)) == (0, report)
    assert (out / "report.html").is_file()
    code, shown, _ = call(*words[:2])
    assert "Which to use" in shown
    assert "qlora's mean held-out loss is" in shown

    code, _, errors = call("--seeds=2", "--set=train.steps=4")
    assert (code, "train.steps" in errors) == (73, True)


def test_what_does_not_fit_is_a_row_and_no_crash(call, tiny_model_folder, tmp_path, monkeypatch):
    """A config of 400 layers beside the tokenizer of the tiny model: planned, never loaded."""
    monkeypatch.setattr(project, "project", lambda comparison, place: [])
    model = tmp_path / "huge"
    model.mkdir()
    for path in tiny_model_folder("llama").iterdir():
        if path.suffix != ".safetensors":
            (model / path.name).write_bytes(path.read_bytes())
    values = json.loads((model / "config.json").read_text())
    values |= {"hidden_size": 8192, "intermediate_size": 65536, "num_hidden_layers": 400}
    values |= {"num_attention_heads": 64, "num_key_value_heads": 64, "head_dim": 128}
    (model / "config.json").write_text(json.dumps(values))
    words = ("--methods=lora", "--seeds=2", "--set=train.steps=2")
    code, shown, errors = call(*words, model=model)
    assert code == 78, errors
    assert "does not fit" in shown
    assert "lora: nothing fits: lora with" in shown
    assert "what would fit:" in shown
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["methods"]["lora"]["status"]["value"] == "does not fit"
    assert errors.count("begins") == 1


def test_a_failed_run_is_shown_with_its_reason_beside_the_others(call, tmp_path):
    words = ("--methods=lora,qlora", "--seeds=1", "--set=train.steps=2")
    code, shown, _ = call(*words, "--set=lora:lora.target=[no_proj]")
    assert code == 2
    assert "lora: lora.target: no linear layer is named 'no_proj'" in shown
    assert "Use qlora here." in shown
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [report["methods"][m]["status"]["value"] for m in ("lora", "qlora")] == [
        "failed",
        "finished",
    ]


@pytest.mark.parametrize(("asked", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_stops_the_run_at_work_and_the_same_command_goes_on(call, tmp_path, asked, code):
    words = call.arguments("--methods=lora", "--seeds=1", "--set=train.steps=5000")
    command = [sys.executable, "-m", "nibble", "compare", *words]
    log, done = tmp_path / "out" / "lora-seed0" / "events.jsonl", 0
    for _ in range(2):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        wait_for_step(log, done + 2, process)
        process.send_signal(asked)
        errors = process.communicate(timeout=60)[1]
        assert process.returncode == code, errors
        assert "run the same command again to continue" in errors
        events = logged(tmp_path / "out", "lora-seed0")
        assert "stopped by SIGTERM" in of(events, "run_end")[-1]["reason"]
        stopped_at = of(events, "step")[-1]["step"]
        assert stopped_at > done
        done = stopped_at
    assert of(logged(tmp_path / "out", "lora-seed0"), "run_start")[-1]["steps_done"] > 0


def wait_for_step(log, number, process):
    give_up = time.monotonic() + 120
    while not (log.is_file() and f'"step": {number},' in log.read_text()):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < give_up
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--methods=qlor",), 2, 'did you mean "qlora"'),
        (("--seeds=0",), 2, "at least 1"),
        (("--set=lora.rnk=1",), 2, 'did you mean "lora.rank"'),
        (("--set=out=x",), 2, "give --out"),
        (("--general-data=none.txt",), 65, "none.txt"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_run(call, words, code, message):
    found, shown, errors = call(*words)
    assert (found, shown, message in errors) == (code, "", True), errors


def test_without_a_folder_it_says_so(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["compare", "--model=x", "--data=y"])
    assert stop.value.code == 2
    assert "--out is not set" in capsys.readouterr().err


def test_the_bar_follows_the_runs(tmp_path, capsys, monkeypatch):
    from nibble.commands.compare import RunsBar

    monkeypatch.setitem(os.environ, "COLUMNS", "200")
    words = ["model.name=m", "data.train=d", "train.steps=10"]
    with RunsBar(read_comparison(None, words, methods=["lora"], num_seeds=2)) as bar:
        bar(Progress("lora-seed0", 1, 2))
        bar(Progress("lora-seed0", 1, 2, step=5))
        assert bar._bar.tasks[0].completed == 0.5
        bar(Progress("lora-seed0", 1, 2, record=Record(76, "the loss is [nan]", seconds=3.2)))
        assert bar._bar.tasks[0].completed == 1
    assert "lora-seed0: the loss is [nan] (3 s)" in capsys.readouterr().err
