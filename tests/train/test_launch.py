"""Which of several processes this is, and how they are started and end."""

import os
import signal
import subprocess
import sys

import pytest

from nibble.errors import UsageError
from nibble.train import launch
from nibble.train.launch import Place, exit_code_of, is_launcher, place_here, torchrun_arguments

RANK = {
    **{"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"},
    **{"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"},
}


def test_a_process_without_others():
    assert place_here({}) == place_here({"WORLD_SIZE": "1"}) == Place()


def test_a_process_of_torchrun():
    assert place_here(RANK) == Place(3, 4, 1, "10.0.0.1", 29500)
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "2"}
    assert place_here({**RANK, **agent}).attempt == 2


def test_rank_0_opens_the_port_where_nobody_did():
    first = {**RANK, "RANK": "0"}
    assert place_here(first).is_server
    assert not place_here({**first, "TORCHELASTIC_USE_AGENT_STORE": "True"}).is_server
    assert not place_here(RANK).is_server


@pytest.mark.parametrize("name", [*RANK])
@pytest.mark.parametrize("value", [None, "", "x", "-1"])
def test_half_an_environment_is_refused(name, value):
    environment = {key: text for key, text in RANK.items() if key != name}
    if value is not None:
        environment[name] = value
    if name == "WORLD_SIZE" and value is None:
        assert place_here(environment) == Place()
    elif name == "MASTER_ADDR" and value:
        assert place_here(environment).address == value
    else:
        with pytest.raises(UsageError, match=name):
            place_here(environment)


def test_a_rank_is_below_the_number_of_ranks():
    with pytest.raises(UsageError, match="RANK=4 is not below WORLD_SIZE=4"):
        place_here({**RANK, "RANK": "4"})


@pytest.mark.parametrize(
    ("devices", "environment", "expected"),
    [
        (1, {}, False),
        (2, {}, True),
        (1, {"PET_NNODES": "2"}, True),
        (2, {"WORLD_SIZE": "2"}, False),
    ],
)
def test_who_starts_others(monkeypatch, devices, environment, expected):
    for name in ("WORLD_SIZE", "PET_NNODES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert is_launcher(devices) == expected


def test_what_torchrun_is_given(monkeypatch):
    monkeypatch.delenv("PET_NNODES", raising=False)
    words = ["train", "run.yaml"]
    alone = torchrun_arguments(2, words)
    assert alone[:2] == ["--nproc-per-node", "2"]
    assert alone[alone.index("--master-addr") + 1] == "127.0.0.1"
    assert alone[-4:] == ["-m", "nibble", *words]
    monkeypatch.setenv("PET_NNODES", "2")
    several = torchrun_arguments(2, words)
    assert "--master-addr" not in several
    assert several[several.index("--rdzv-backend") + 1] == "static"


@pytest.mark.parametrize("is_nohup", [False, True])
def test_what_torchrun_hands_on_and_waits_for(monkeypatch, is_nohup):
    monkeypatch.setattr(os, "environ", {})
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if is_nohup else signal.SIG_DFL)
    try:
        launch._set_environment(2, 600, is_one_machine=True)
    finally:
        signal.signal(signal.SIGHUP, before)
    heeded = os.environ["PET_SIGNALS_TO_HANDLE"].split(",")
    assert {"SIGTERM", "SIGINT", "SIGUSR1"} <= set(heeded)
    assert ("SIGHUP" in heeded) == (not is_nohup)
    assert os.environ["PET_SHUTDOWN_TIMEOUT"] == "635"


@pytest.mark.parametrize(
    ("codes", "expected"),
    [([75, 75], 75), ([75, 74], 74), ([-9, 75], 75), ([76], 76), ([-15], 75), ([75, 1], 1)],
)
def test_one_exit_code_for_all(codes, expected):
    assert exit_code_of(codes) == expected


def test_it_is_known_without_torch():
    code = "import sys, nibble.train.launch\nassert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ}).returncode == 0
