"""What a job runs, and which options make none."""

import re

import pytest

from nibble.config import load_config
from nibble.errors import UsageError
from nibble.experiment.launch.job import Options, check_options, make_job, name_of, train_words

from .conftest import UGLY

HERE = {"workdir": "/w", "python": "python3"}


def a_run(**values):
    return load_config(None, ["model.name=m", "data.train=d"]).with_values(values, "flag")


def a_job(run, *, is_mounted=False, **options):
    return make_job(run, Options(**options), gpus=2, defaults=HERE, is_mounted=is_mounted)


@pytest.mark.parametrize(
    "values",
    [
        {"model.name": UGLY, "data.train": [UGLY, "b"], "data.eval": UGLY},
        {"data.eval": 0.05, "optim.lr": 1e-4, "lora.target": ["q_proj"], "train.steps": None},
        {"optim.paged": True, "train.save_every": "10min", "model.name": "0.5"},
    ],
)
def test_the_words_are_the_run(values):
    run = a_run(**values)
    words = train_words(run, "/w/out", 2)
    assert words[0] == "train"
    assert words[-2:] == ["--devices", "2"]
    again = load_config(None, words[2:-2:2])
    assert again.flat() == {**run.flat(), "out": "/w/out"}


def test_the_words_of_a_recipe(tmp_path):
    recipe = tmp_path / "run.yaml"
    recipe.write_text("model: {name: m}\ndata: {train: d}\nlora: {rank: 8}\n")
    words = train_words(load_config(recipe, ["lora.rank=4"]), "/w/out", 1, anyway=True)
    settings = [word for word in words if "=" in word]
    assert settings == ['out="/w/out"', 'model.name="m"', "lora.rank=4", 'data.train="d"']
    assert words[-3:] == ["--anyway", "--devices", "1"]


@pytest.mark.parametrize("text", [UGLY, "", "ÄÖÜ", "-.-", "x" * 300, "0"])
def test_a_name_that_every_place_takes(text):
    name = name_of(f"/runs/{text.replace('/', '')}")
    assert re.fullmatch(r"[a-z][a-z0-9-]{0,47}", name)
    assert not name.endswith("-")


def test_other_folders_have_other_names():
    assert len({name_of("/a/first"), name_of("/b/first"), name_of("/a/first", "claim")}) == 3


def test_what_a_job_is_made_of():
    run = a_run(**{"train.stop_within": "2min"})
    job = a_job(run, nodes=3, memory="2GiB", time="90min", cpus=4, python="/v/python")
    assert job.words[:4] == ("/v/python", "-m", "nibble", "train")
    assert 'out="/w/runs/m-auto"' in job.words
    assert (job.nodes, job.gpus, job.cpus, job.memory_bytes) == (3, 2, 4, 2**31)
    assert (job.seconds, job.stop_seconds, job.workdir) == (5400, 120, "/w")
    assert a_job(run, hosts=("a", "b")).nodes == 2


@pytest.mark.parametrize(
    ("out", "options", "is_mounted"),
    [
        ("/tmp/run", {}, False),
        ("/dev/shm/x/run", {}, False),
        ("/shared/../tmp/run", {}, False),
        ("/elsewhere/run", {}, True),
        ("../run", {}, True),
        ("/workspace/run", {"workdir": "/workspaces"}, True),
    ],
)
def test_a_folder_that_the_next_attempt_would_not_find(out, options, is_mounted):
    with pytest.raises(UsageError, match=r"out: .* another attempt"):
        a_job(a_run(out=out), is_mounted=is_mounted, **options)


@pytest.mark.parametrize(
    ("out", "options", "is_mounted"),
    [("/shared/tmp/run", {}, False), ("/w/run", {}, True), ("/tmp/run", {"hosts": ("a",)}, False)],
)
def test_a_folder_that_it_finds(out, options, is_mounted):
    assert f'out="{out}"' in a_job(a_run(out=out), is_mounted=is_mounted, **options).words


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workdir": "w"}, "--workdir w is not absolute"),
        ({"python": "a\x1bb"}, "characters that no file can hold"),
        ({"image": "\udc80"}, "characters that no file can hold"),
        ({"memory": "64"}, "no unit|unit"),
        ({"time": "8"}, "--time '8' is no time"),
    ],
)
def test_values_that_make_no_job(options, message):
    with pytest.raises(UsageError, match=message):
        a_job(a_run(), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpus": 2}, "--on x needs --memory"),
        ({"memory": "1GiB"}, "--gpus is not set"),
        ({"memory": "1GiB", "gpus": 0}, "--gpus 0 is not from 1 to 64"),
        ({"memory": "1GiB", "gpus": -1}, "--gpus -1 is not from 1 to 64"),
        ({"memory": "1GiB", "gpus": 1, "nodes": 0}, "--nodes 0 is not from 1"),
        ({"memory": "1GiB", "gpus": 1, "cpus": 0}, "--cpus has no effect with --on x"),
        ({"memory": "1GiB", "gpus": 1, "device": "T4"}, "exclude each other"),
        ({"memory": "1GiB", "device": "no such card"}, "no such card"),
        ({"memory": "1GiB", "device": "2x T4"}, "is not one GPU"),
        ({"memory": "1GiB", "device": "cpu"}, "is not one GPU"),
        ({"memory": "1GiB", "gpus": 1, "hosts": ("-oProxyCommand=x",)}, "is no name of a host"),
        ({"memory": "1GiB", "gpus": 1, "hosts": ("a b",)}, "is no name of a host"),
        ({"memory": "1GiB", "gpus": 1, "hosts": ("$(x)",)}, "is no name of a host"),
        ({"memory": "1GiB", "gpus": 1, "hosts": ("a:22",)}, "is no name of a host"),
        ({"memory": "1GiB", "gpus": 1, "hosts": ("[::1]",)}, "is no name of a host"),
        ({"memory": "1GiB", "gpus": 1, "hosts": ("-a@b",)}, "is no name of a host"),
        ({"memory": "1GiB", "gpus": 1, "hosts": ("a", "a")}, "stands twice"),
        ({"memory": "1GiB", "gpus": 1, "hosts": ("a", "me@a")}, "stands twice"),
        ({"memory": "1GiB", "gpus": 1, "port": 80}, "--port 80 is not from 1024"),
    ],
)
def test_options_that_are_refused(options, message):
    takes = ("gpus", "nodes", "device", "hosts", "port")
    with pytest.raises(UsageError, match=message):
        check_options(Options(**options), "x", needs=("memory",), takes=takes)


def test_options_that_are_taken():
    takes = ("gpus", "nodes", "hosts", "device")
    for options in (
        {"gpus": 8, "nodes": 2, "hosts": ("ec2-user@gpu-0.lab", "10.0.0.1", "::1", "me@fe80::1")},
        {"device": "A100-80GB"},
        {"device": "24GiB"},
    ):
        check_options(Options(**options), "x", needs=(), takes=takes)
    check_options(Options(device="H100", gpus=2), "sky", needs=("device",), takes=takes)
