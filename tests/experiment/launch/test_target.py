"""Each kind of place: the file it gets, compared with the one that was read and found right."""

import os
import runpy
from dataclasses import replace
from pathlib import Path

import pytest

from nibble.config import load_config
from nibble.errors import DoesNotFitError, FolderInUseError, UsageError
from nibble.experiment.launch.job import Options
from nibble.experiment.launch.target import TARGETS, target_of, write_launch
from nibble.plan.plan import make_plan
from nibble.plan.watch import BASE_DENSE

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "launch"
FOUND = [
    "slurm-one.sbatch", "slurm-two.sbatch", "k8s-one.yaml", "k8s-two.yaml", "sky-one.yaml",
    "sky-two.yaml", "ssh-one.sh", "ssh-two.sh",
]  # fmt: skip
SLURM = Options(memory="64GiB", cpus=16, workdir="/shared")


@pytest.fixture
def run():
    return load_config(None, ["model.name=m", "data.train=d"])


@pytest.fixture(scope="module")
def golden():
    """The script that wrote the files."""
    return runpy.run_path(str(GOLDEN.with_name("make_launch.py")))


@pytest.mark.parametrize("name", FOUND)
def test_the_file_is_the_one_that_was_read(name, golden, tmp_path):
    assert {path.name for path in GOLDEN.iterdir()} == set(FOUND)
    made = golden["write"](name.partition(".")[0], tmp_path)
    assert made.name == name
    assert made.read_text(encoding="utf-8") == (GOLDEN / name).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "commands"),
    [
        ("slurm", ["sbatch f"]),
        ("sky", ["sky jobs launch f"]),
        ("ssh", ["bash f"]),
        (
            "k8s",
            [
                "kubectl delete --ignore-not-found --cascade=foreground -f f",
                "kubectl apply -f f",
            ],
        ),
    ],
)
def test_what_starts_it(name, commands):
    assert [" ".join(words) for words in target_of(name).commands("f")] == commands


def test_a_target_that_is_none():
    with pytest.raises(UsageError, match=r"none of slurm, k8s, sky, ssh(.|\n)*did you mean"):
        target_of("slrum")


def test_every_option_has_an_effect_somewhere():
    taken = {name for target in TARGETS.values() for name in (*target.needs, *target.takes)}
    assert taken == Options.__dataclass_fields__.keys()


def test_writing_it_again_and_over_something_else(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = Options(**{**SLURM.given(), "gpus": 2})
    made = write_launch(run, "slurm", options)
    text = made.file.read_text()
    assert write_launch(run, "slurm", options).file.read_text() == text
    assert "--time" not in text
    longer = Options(**options.given(), time="4h")
    assert write_launch(run, "slurm", longer).file == made.file
    assert "--time=4:00:00" in made.file.read_text()
    made.file.write_text("#!/bin/bash\necho mine\n")
    with pytest.raises(FolderInUseError, match="holds something else"):
        write_launch(run, "slurm", options)
    with pytest.raises(UsageError, match="is a folder"):
        write_launch(run, "slurm", options, to=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [made.file.name]


def test_a_pipe_is_not_replaced(run, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(FolderInUseError, match="holds something else"):
        write_launch(run, "slurm", Options(**SLURM.given(), gpus=1), to=pipe)
    assert pipe.is_fifo()


def test_a_file_that_looks_like_an_option(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = write_launch(run, "slurm", Options(**SLURM.given(), gpus=1), to=Path("-job"))
    assert made.commands == [["sbatch", "./-job"]]
    assert (tmp_path / "-job").is_file()


@pytest.fixture(scope="module")
def plan(tiny_model_folder):
    model = f"model.name={tiny_model_folder('llama')}"
    return make_plan(load_config(None, [model, "method=lora"]), "24GiB")[0]


@pytest.mark.parametrize(
    ("settings", "nodes", "needed_bytes", "gpus"),
    [
        ((), 1, 10, 1),
        ((), 1, 11, None),
        (("train.shard=true",), 1, 10, 1),
        (("train.shard=true",), 1, 12, 2),
        (("train.shard=true",), 1, 16, 8),
        (("train.shard=true",), 2, 16, 4),
        (("train.shard=true",), 1, 18, None),
        (("train.shard=true",), 2, 18, None),
    ],
)
def test_the_plan_says_how_many_gpus(
    plan, monkeypatch, tmp_path, settings, nodes, needed_bytes, gpus
):
    """Ten bytes a GPU, for layers of seven that are cut and what is whole on each."""
    made = replace(
        plan,
        fits=needed_bytes <= 10,
        needed_bytes=needed_bytes,
        budget_bytes=10,
        parts={BASE_DENSE: 7},
    )
    monkeypatch.setattr("nibble.plan.plan.make_plan", lambda run, device: (made, None))
    run = load_config(None, ["model.name=m", "data.train=d", *settings])
    options = Options(**SLURM.given(), device="24GiB", nodes=nodes)
    file = tmp_path / "job"
    if gpus is None:
        with pytest.raises(DoesNotFitError, match="give --gpus"):
            write_launch(run, "slurm", options, to=file)
        assert not file.exists()
        return
    write_launch(run, "slurm", options, to=file)
    assert f"#SBATCH --gpus-per-node={gpus}\n" in file.read_text()


def test_a_run_that_fits_one_gpu(tiny_model_folder, tmp_path):
    run = load_config(None, [f"model.name={tiny_model_folder('llama')}", "method=lora"])
    options = Options(**SLURM.given(), device="T4")
    made = write_launch(run, "slurm", options, to=tmp_path / "job")
    assert "#SBATCH --gpus-per-node=1\n" in made.file.read_text()
