"""`nibble launch` as a person uses it."""

import json
import subprocess
import sys

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
def sbatch(tmp_path, monkeypatch):
    """A stand-in that writes down its words and ends as it is told."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def make(code):
        program = folder / "sbatch"
        program.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/words\nexit {code}\n')
        program.chmod(0o755)

    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return make


def test_nothing_is_started_unless_asked(call, sbatch, tmp_path):
    sbatch(0)
    name = "job $(touch PWNED) 'x'"
    assert call(*RUN, *SLURM, "--to", name)[0] == 0
    assert not (tmp_path / "words").exists()
    assert call(*RUN, *SLURM, "--to", name, "--submit")[0] == 0
    assert (tmp_path / "words").read_text() == f"{name}\n"
    sbatch(3)
    assert call(*RUN, *SLURM, "--to", name, "--submit")[0] == 3
    assert not (tmp_path / "PWNED").exists()


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
