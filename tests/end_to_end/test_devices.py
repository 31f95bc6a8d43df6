"""`nibble train --devices`: processes that torchrun starts, on one machine and on two."""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

LONGEST_SECONDS = 30


class Command:
    """The same `nibble train`, in folders of its own."""

    def __init__(self, model, folder):
        self.model, self.folder = model, folder
        self.data = folder / "rows.jsonl"
        words = ["one", "two", "three", "four", "five", "six"]
        rows = [{"prompt": f"say {a} {b}", "completion": f"{b} {a}"} for a in words for b in words]
        self.data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def start(self, name, devices, log, **environment):
        settings = [
            *("data.max_seq_len=64", "train.batch_size=8", "train.micro_batch_size=2"),
            *("train.steps=120", "lora.rank=4", "lora.dropout=0.1", "model.dtype=float32"),
            *("train.recompute=none", "optim.paged=false", "model.embeddings=device"),
            *("train.save_every=20",),
        ]
        words = ["train", "--model", self.model, "--data", self.data, "--method", "lora"]
        words += ["--out", self.folder / name, "--devices", devices]
        words += [word for setting in settings for word in ("--set", setting)]
        command = [sys.executable, "-m", "nibble", *map(str, words)]
        with (self.folder / log).open("w") as file:
            return subprocess.Popen(
                command, stdout=file, stderr=file, env={**os.environ, **environment}
            )

    def on_two(self, name):
        """Two machines of one process each, both of them here."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            place = {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(free.getsockname()[1])}
        place |= {"PET_NNODES": "2", "GLOO_SOCKET_IFNAME": "lo"}
        return [
            self.start(name, 1, f"{name}-{node}.log", PET_NODE_RANK=str(node), **place)
            for node in (0, 1)
        ]

    def until_it_has_saved(self, name):
        give_up = time.monotonic() + 60
        while not list((self.folder / name).glob("checkpoints/step-0000004*")):
            assert time.monotonic() < give_up
            time.sleep(0.02)

    def results(self, name):
        out = self.folder / name
        files = [max((out / "checkpoints").iterdir()) / "state.safetensors"]
        files += [out / "adapter" / "adapter_model.safetensors"]
        return [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]


@pytest.fixture(scope="module")
def command(tiny_model_folder, tmp_path_factory):
    return Command(tiny_model_folder("llama"), tmp_path_factory.mktemp("devices"))


@pytest.fixture(scope="module")
def whole(command):
    """A run on two devices of one machine; ranks are the same wherever they are."""
    assert command.start("whole", 2, "whole.log").wait(100) == 0
    return command.results("whole")


def test_the_command_that_is_run_is_shown(command, whole):
    said = (command.folder / "whole.log").read_text()
    assert "-m torch.distributed.run --nproc-per-node 2" in said.splitlines()[0]
    assert said.count("training loss") == 1
    assert command.start("whole", 2, "again.log").wait(100) == 0
    assert "is finished already" in (command.folder / "again.log").read_text()


def test_a_scheduler_that_stops_it_can_requeue_it(command, whole):
    process = command.start("stopped", 2, "stopped.log")
    command.until_it_has_saved("stopped")
    ranks = psutil.Process(process.pid).children(recursive=True)
    # Some signal every process of a job, and say it again.
    for asked in (process, *ranks, process, process):
        asked.send_signal(signal.SIGTERM)
        time.sleep(0.01)
    assert process.wait(LONGEST_SECONDS) == 75
    assert not any(rank.is_running() for rank in ranks)
    lines = (command.folder / "stopped" / "events.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    trained, saved = (
        max(event["step"] for event in events if event["event"] == kind)
        for kind in ("step", "checkpoint")
    )
    assert trained == saved
    assert command.start("stopped", 2, "stopped.log").wait(100) == 0
    assert command.results("stopped") == whole


@pytest.mark.parametrize("gone", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_machine_that_is_gone(command, whole, gone):
    name = f"gone-{gone}"
    machines = command.on_two(name)
    command.until_it_has_saved(name)
    lost = psutil.Process(machines[gone].pid)
    for process in [lost, *lost.children(recursive=True)]:
        process.kill()
    start = time.monotonic()
    assert machines[1 - gone].wait(LONGEST_SECONDS) == 75
    print(f"machine {gone} killed: the other ended after {time.monotonic() - start:.1f} s")
    machines[gone].wait()
    assert [machine.wait(100) for machine in command.on_two(name)] == [0, 0]
    assert command.results(name) == whole
