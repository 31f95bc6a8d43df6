"""`nibble launch` as a person uses it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nibble.commands.main import main

SLURM = ["--on", "slurm", "--gpus", "2", "--cpus", "8", "--memory", "64GiB", "--workdir", "/s"]
RUN = ["--model", "m", "--data", "d.jsonl"]


@pytest.fixture
def call(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*words):
        with pytest.raises(SystemExit) as stop:
            main(["launch", *words])
        return stop.value.code, *capsys.readouterr()

    return run


def test_a_recipe_and_what_overrides_it(call, tmp_path):
    (tmp_path / "run.yaml").write_text("model: {name: m}\ndata: {train: d}\nout: runs/first\n")
    code, shown, errors = call("run.yaml", "--set", "lora.rank=4", *SLURM)
    (file,) = [path for path in tmp_path.iterdir() if path.name != "run.yaml"]
    assert (code, shown, errors) == (0, f"sbatch {file.name}\n", f"wrote {file.name}\n")
    text = file.read_text()
    for setting in ('out="/s/runs/first"', 'model.name="m"', "lora.rank=4", "--devices 2"):
        assert setting in text


def test_the_same_command_again_is_the_same_file(call, tmp_path):
    first = call(*RUN, *SLURM, "--to", "job.sh")
    text = (tmp_path / "job.sh").read_text()
    assert call(*RUN, *SLURM, "--to", "job.sh") == first
    assert (tmp_path / "job.sh").read_text() == text


def test_json(call):
    code, shown, _ = call(
        *RUN, "--on", "ssh", "--host", "a", "--gpus", "1", "--to", "x y", "--json"
    )
    expected = {"version": 1, "file": "x y", "commands": [["bash", "x y"]]}
    assert (code, json.loads(shown)) == (0, expected)
    assert (
        call(*RUN, "--on", "ssh", "--host", "a", "--gpus", "1", "--to", "x y")[1] == "bash 'x y'\n"
    )


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """A folder for stand-ins of what starts a job."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)

    def make(name, text):
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)

    return make


def started(*words):
    command = [sys.executable, "-m", "nibble", "launch", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def submitted(*words):
    """Exit code, stdout and stderr of a process of its own: the command takes its place."""
    with started(*words, "--submit") as process:
        said = process.communicate(timeout=60)
    return process.returncode, *said


def test_nothing_is_started_unless_asked(call, programs, tmp_path):
    programs("sbatch", f'printf "%s\\n" "$@" > {tmp_path}/words\nexit 3')
    name = "job $(touch PWNED) 'x'"
    assert call(*RUN, *SLURM, "--to", name)[0] == 0
    assert not (tmp_path / "words").exists()
    assert submitted(*RUN, *SLURM, "--to", name)[0] == 3
    assert (tmp_path / "words").read_text() == f"{name}\n"
    assert not (tmp_path / "PWNED").exists()


def test_one_json_document_whatever_is_run(programs):
    programs("kubectl", 'echo "$1"')
    words = ["--on", "k8s", "--gpus", "1", "--memory", "1GiB", "--image", "i", "--storage", "c"]
    code, shown, errors = submitted(*RUN, *words, "--json")
    assert (code, json.loads(shown)["version"]) == (0, 1)
    assert errors.splitlines()[-2:] == ["delete", "apply"]
    programs("kubectl", 'echo "$1" >> order; [ "$1" = apply ] || exit 4')
    assert submitted(*RUN, *words)[0] == 4
    assert Path("order").read_text() == "delete\n"


def test_a_signal_is_for_what_was_started(programs):
    programs("bash", "trap 'exit 75' TERM\necho ready\nwhile :; do sleep 0.05; done")
    words = ["--on", "ssh", "--host", "a", "--gpus", "1", "--to", "job", "--submit"]
    with started(*RUN, *words) as process:
        assert [process.stdout.readline() for _ in range(2)] == ["bash job\n", "ready\n"]
        process.terminate()
        assert process.wait(20) == 75


def test_the_program_is_not_here(call, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, errors = call(*RUN, *SLURM, "--submit")
    assert (code, "sbatch is not on this machine" in errors) == (69, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*SLURM], "model.name is not set"),
        ([*RUN, *SLURM, "--set", "lora.rnk=1"], 'did you mean "lora.rank"'),
        ([*RUN, *SLURM, "--set", "train.eval_every=5"], "needs data.eval"),
        (["none.yaml", *RUN, *SLURM], "does not exist"),
        ([*RUN], "is none of slurm, k8s, sky, ssh"),
        ([*RUN, *SLURM, "--on", "slrm"], 'did you mean "slurm"'),
        ([*RUN, *SLURM, "--nodes", "0"], "--nodes 0 is not from 1"),
        ([*RUN, *SLURM, "--time", "1min"], "the last 120 s are kept"),
        ([*RUN, *SLURM, "--image", "x"], "--image has no effect with --on slurm"),
        ([*RUN, *SLURM, "--host", "x"], "--host has no effect with --on slurm"),
        ([*RUN, *SLURM, "--out", "/tmp/run"], "on the disk of one machine"),
        ([*RUN, "--on", "slurm"], "--on slurm needs --memory"),
        ([*RUN, "--on", "k8s", "--gpus", "1", "--memory", "1GiB"], "--on k8s needs --image"),
        ([*RUN, "--on", "sky", "--gpus", "1"], "--on sky needs --device"),
        ([*RUN, "--on", "ssh", "--gpus", "1"], "--on ssh needs --host"),
    ],
)
def test_bad_input(call, tmp_path, words, message):
    code, shown, errors = call(*words)
    assert (code, shown, message in errors) == (2, "", True), errors
    assert "Traceback" not in errors
    assert not list(tmp_path.iterdir())


def test_it_needs_no_torch_where_nothing_is_planned(tmp_path):
    words = ["launch", *RUN, *SLURM, "--to", str(tmp_path / "job")]
    code = (
        "import sys\nfrom nibble.commands.main import main\n"
        f"try:\n    main({words})\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
