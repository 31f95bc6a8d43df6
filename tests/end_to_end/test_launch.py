"""`nibble launch`: its scripts with real runs on two machines, both of them here."""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest

LONGEST_SECONDS = 30
FIRST_SAVED = "step-00000020"
HOSTS = ("127.0.0.1", "localhost")
# A folder under /tmp is refused for a cluster; this one is put in its place afterwards.
CLUSTER = "/shared-by-all"
SETTINGS = (
    "data.max_seq_len=64", "train.batch_size=8", "train.micro_batch_size=2", "train.steps=120",
    "lora.rank=4", "model.dtype=float32", "train.recompute=none", "optim.paged=false",
    "model.embeddings=device", "train.save_every=20",
)  # fmt: skip
# Each does on this machine what the program does on another.
FAKES = {
    "ssh": 'while [ "$1" != -- ]; do shift; done; exec sh -c "$3"',
    "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
    "scontrol": 'if [ "$1" = show ]; then echo "$3" | tr , "\\n"; else echo "$@" >> requeued; fi',
    "squeue": "echo RUNNING",
}


class Place:
    """A folder in which jobs are launched."""

    def __init__(self, model, folder):
        self.model, self.folder, self.started = model, folder, []
        words = ["one", "two", "three", "four", "five", "six"]
        rows = [{"prompt": f"say {a} {b}", "completion": f"{b} {a}"} for a in words for b in words]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "rows $(touch PWNED).jsonl").write_text(text)
        programs = folder / "bin"
        programs.mkdir()
        for name, script in FAKES.items():
            (programs / name).write_text(f"#!/bin/sh\n{script}\n")
            (programs / name).chmod(0o755)
        self.environment = {
            **os.environ,
            "PATH": f"{programs}:{os.environ['PATH']}",
            **{"GLOO_SOCKET_IFNAME": "lo", "SLURM_JOB_NODELIST": ",".join(HOSTS)},
        }

    def launch(self, name, *words):
        """Write the script of a run and give the command that starts it."""
        given = ["--model", self.model, "--data", "rows $(touch PWNED).jsonl", "--gpus", 1]
        given += ["--method", "lora", *(word for one in SETTINGS for word in ("--set", one))]
        given += ["--out", f"shared/{name}", "--to", f"{name}.sh", *words]
        command = [sys.executable, "-m", "nibble", "launch", *map(str, given)]
        shown = subprocess.run(
            command, cwd=self.folder, env=self.environment, check=True, stdout=subprocess.PIPE
        )
        return shown.stdout.decode().split()

    def by_ssh(self, name):
        hosts = [word for host in HOSTS for word in ("--host", host)]
        return self.launch(name, "--on", "ssh", *hosts, "--port", 20000 + a_free_number())

    def start(self, command, **more):
        environment = {**self.environment, **more}
        with (self.folder / "log").open("ab") as log:
            process = subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=log, stderr=log
            )
        self.started.append(process)
        return process

    def until_it_has_saved(self, name, script):
        """Its first steps: what is done to it then is done long before the last one."""
        give_up = time.monotonic() + 120
        while not (self.folder / "shared" / name / "checkpoints" / FIRST_SAVED).exists():
            assert script.poll() is None
            assert time.monotonic() < give_up
            time.sleep(0.02)

    def close(self):
        """What a failed test has left: without its script a run saves and ends."""
        for process in self.started:
            process.kill()
            process.wait()

    def results(self, name):
        out = self.folder / "shared" / name
        files = [max((out / "checkpoints").iterdir()) / "state.safetensors"]
        files += [out / "adapter" / "adapter_model.safetensors"]
        return [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]

    def machine(self, script, rank):
        """The processes of one machine, its launcher first."""
        found = [
            process
            for process in psutil.Process(script.pid).children(recursive=True)
            if process.environ().get("PET_NODE_RANK") == str(rank)
            and process.cmdline()[1:3] == ["-m", "nibble"]
        ]
        return [found[0], *found[0].children(recursive=True)]


@pytest.fixture(scope="module")
def place(tiny_model_folder, tmp_path_factory):
    place = Place(tiny_model_folder("llama"), tmp_path_factory.mktemp("launch"))
    yield place
    place.close()


@pytest.fixture(scope="module")
def whole(place):
    """A run that nothing stops."""
    assert place.start(place.by_ssh("whole")).wait(120) == 0
    assert not list(place.folder.rglob("PWNED"))
    return place.results("whole")


@pytest.mark.slow
def test_a_finished_run_says_so(place, whole):
    assert place.start(place.by_ssh("whole")).wait(120) == 0
    assert "is finished already" in (place.folder / "log").read_text()


@pytest.mark.parametrize("gone", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_machine_that_is_gone(place, whole, gone):
    name = f"gone-{gone}"
    command = place.by_ssh(name)
    script = place.start(command)
    place.until_it_has_saved(name, script)
    for process in place.machine(script, gone):
        process.kill()
    start = time.monotonic()
    assert script.wait(LONGEST_SECONDS) == 75
    print(f"machine {gone} killed: the script ended after {time.monotonic() - start:.1f} s")
    assert place.start(command).wait(120) == 0
    assert place.results(name) == whole


@pytest.mark.slow
def test_slurm_ends_its_time_and_begins_another(place, whole):
    name, job = "queued", {"SLURM_JOB_ID": str(a_free_number())}
    words = ["--on", "slurm", "--nodes", 2, "--cpus", 1, "--memory", "1GiB"]
    place.launch(name, *words, "--workdir", CLUSTER)
    script = place.folder / f"{name}.sh"
    script.write_text(script.read_text().replace(CLUSTER, str(place.folder)))
    process = place.start(["bash", script], **job)
    place.until_it_has_saved(name, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(LONGEST_SECONDS) == 75
    requeued = place.folder / "requeued"
    assert requeued.read_text() == f"requeue {job['SLURM_JOB_ID']}\n"
    requeued.unlink()
    assert place.start(["bash", script], **job).wait(120) == 0
    assert not requeued.exists()
    assert place.results(name) == whole


def a_free_number():
    """Machines can meet at 20000 and this, where no connection of another test begins."""
    for number in range(os.getpid() % 9000, 10000):
        with socket.socket() as free, suppress(OSError):
            free.bind(("127.0.0.1", 20000 + number))
            return number
    raise AssertionError
