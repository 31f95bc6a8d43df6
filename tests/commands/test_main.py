"""The command line as a person uses it."""

import json
import os
import resource
import signal
import subprocess
import sys

import pytest

from nibble.commands.main import main


def _call(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        main(words)
    out, err = capsys.readouterr()
    return stop.value.code, out, err


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "train.jsonl"
    rows = [
        {"prompt": f"say {word}", "completion": word} for word in ["one", "two", "three", "four"]
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_help_is_quick():
    """Processor time, which other work on the machine does not stretch; half a second at most."""
    command = [sys.executable, "-m", "nibble", "--help"]
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        user, system = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
        seconds.append(user + system)
    assert min(seconds) <= 0.5


def test_a_process_of_its_own_gives_all_output_and_its_code():
    def run(*words):
        return subprocess.run([sys.executable, "-m", "nibble", *words], capture_output=True)

    schema = run("schema")
    assert schema.returncode == 0
    assert json.loads(schema.stdout)["properties"]
    wrong = run("explain", "no.such.key")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith(b"nibble: ")


def _child(body, words=("plan",)):
    """A process of its own whose verb is a function with this body."""
    code = (
        "import os, signal, sys\nfrom nibble.commands import main\n"
        f"def verb(words, is_debug):\n    {body}\n    return 65\n"
        f"main._run = verb\nsys.argv[1:] = {list(words)!r}\nmain.main()"
    )
    return [sys.executable, "-c", code]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGHUP"])
def test_a_signal_where_no_run_hears_it_gives_the_code_of_a_stopped_run(name):
    body = f"os.kill(os.getpid(), signal.{name})"
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    done = subprocess.run(_child(body), capture_output=True)
    signal.signal(signal.SIGHUP, before)
    assert (done.returncode, done.stderr) == (75, b"")


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    done = subprocess.run(_child("os.kill(os.getpid(), signal.SIGHUP)"))
    signal.signal(signal.SIGHUP, before)
    assert done.returncode == 65


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("words", [["plan"], ["chat"]])
def test_a_command_outlives_its_reader_but_a_chat_does_not(stream, words, tmp_path):
    """Click and Rich would have ended the command with 1."""
    say = "typer.echo('x' * 9999, err=is_err); Console(stderr=is_err).print('x' * 9999)"
    body = (
        f"import typer; from rich.console import Console; is_err = {stream == 'stderr'}; {say}; "
        f"open({str(tmp_path / 'done')!r}, 'w')"
    )
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(_child(body, words), **{stream: write})
    os.close(write)
    is_chat = words == ["chat"]
    assert (tmp_path / "done").exists() != is_chat
    assert (done.returncode == 65) != is_chat


def test_train_eval_and_train_again(capsys, tiny_model_folder, data, tmp_path):
    folder, out = str(tiny_model_folder("llama")), str(tmp_path / "out")
    words = ["--model", folder, "--data", str(data), "--eval-data", str(data), "--out", out]
    settings = ["--method", "qlora", "--set", "train.steps=2", "--set", "data.max_seq_len=64"]
    code, text, err = _call(capsys, "train", *words, *settings)
    assert code == 0, err
    assert "held-out loss" in text
    code, text, err = _call(capsys, "train", *words, *settings, "--json")
    assert "finished already" in err
    assert json.loads(text)["version"] == 1
    adapter = ["--adapter", f"{out}/adapter", "--method", "qlora", "--json"]
    code, text, err = _call(capsys, "eval", "--model", folder, "--data", str(data), *adapter)
    assert code == 0, err
    assert json.loads(text).keys() == {
        "version",
        "loss",
        "perplexity",
        "token_accuracy",
        "num_target_tokens",
    }
    code, text, err = _call(capsys, "replay", out, "--json")
    assert code == 0, err
    assert json.loads(text)["num_steps"] == 2
    assert (tmp_path / "out-replay" / "adapter").is_dir()


def test_chat_compares(capsys, monkeypatch, tiny_model_folder, data, tmp_path):
    import io

    folder, out = str(tiny_model_folder("llama")), str(tmp_path / "out")
    words = ["--model", folder, "--data", str(data), "--out", out, "--method", "lora"]
    assert _call(capsys, "train", *words, "--set", "train.steps=1")[0] == 0
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    words = ["--model", folder, "--adapter", f"{out}/adapter", "--compare"]
    code, text, err = _call(capsys, "chat", *words, "--max-new-tokens", "3")
    assert code == 0, err
    assert "base:" in text
    assert "adapter:" in text


def test_doctor(capsys):
    code, text, _ = _call(capsys, "doctor", "--json")
    report = json.loads(text)
    assert code == 0
    assert all(report["checks"].values())


def test_schema_and_explain(capsys):
    assert json.loads(_call(capsys, "schema")[1])["title"] == "RunConfig"
    code, text, _ = _call(capsys, "explain", "lora.rank")
    assert code == 0
    assert "default: 16" in text
    assert "memory:" in text
    code, _, err = _call(capsys, "explain", "lora.rnk")
    assert (code, 'did you mean "lora.rank"' in err) == (2, True)


def _broken(tmp_path, model, data):
    """name: (words, exit code, part of the message)."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("x")
    files = {"empty": b"", "bad": b"{", "latin": b'{"prompt": "\xff", "completion": "a"}'}
    for name, content in files.items():
        (tmp_path / f"{name}.jsonl").write_bytes(content)
    run = ["--model", model, "--data", str(data), "--method", "lora"]
    out = ["--out", str(tmp_path / "out")]
    return {
        "no model": (["--data", str(data)], 2, "model.name is not set"),
        "no data": (["--model", model, *out], 2, "data.train is not set"),
        "no such folder": (["--model", "./none", "--data", str(data)], 2, "no such folder"),
        "hub id offline": (["--model", "meta-llama/none", "--data", str(data)], 69, "cache"),
        "unknown key": ([*run, "--set", "lora.rnk=1"], 2, 'did you mean "lora.rank"'),
        "out of range": ([*run, "--set", "lora.rank=0"], 2, "greater than or equal to 1"),
        "unknown method": ([*run[:4], "--method", "qlor"], 2, "qlora"),
        "empty file": ([*run[:2], "--data", str(tmp_path / "empty.jsonl"), *out], 65, "empty"),
        "broken json": ([*run[:2], "--data", str(tmp_path / "bad.jsonl"), *out], 65, "bad.jsonl:1"),
        "bad utf-8": ([*run[:2], "--data", str(tmp_path / "latin.jsonl"), *out], 65, "UTF-8"),
        "no such data": (
            [*run[:2], "--data", str(tmp_path / "none.jsonl"), *out],
            65,
            "none.jsonl",
        ),
        "folder in use": ([*run, "--out", str(other)], 73, "thesis.txt"),
        "fresh": ([*run, "--out", str(other), "--fresh"], 73, "not empty"),
        "long row": (
            [*run, *out, "--set", "data.max_seq_len=8", "--set", "data.on_long_row=stop"],
            65,
            "max_seq_len",
        ),
    }


CASES = (
    "no model", "no data", "no such folder", "hub id offline", "unknown key", "out of range",
    "unknown method", "empty file", "broken json", "bad utf-8", "no such data", "folder in use",
    "fresh", "long row",
)  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_input(capsys, tiny_model_folder, data, tmp_path, case):
    words, code, message = _broken(tmp_path, str(tiny_model_folder("llama")), data)[case]
    found, _, err = _call(capsys, "train", *words)
    assert (found, message in err) == (code, True), err
    assert "Traceback" not in err
