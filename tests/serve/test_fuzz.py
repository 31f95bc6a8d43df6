"""Whatever clients send, nothing answers with an error of ours, and nothing stays behind."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest

from nibble.adapter.format import write_adapter
from nibble.model.adapt import adapt
from nibble.model.load import load_base

from .fake import fake_service
from .fuzz import Fuzz, drip
from .live import TOKEN, read_answer, running

SERVED = Path(__file__).with_name("served.py")


def test_500_requests_of_every_kind(tmp_path):
    with running(fake_service("law", "med", folders=[tmp_path])) as live:
        idle = [live.connect() for _ in range(64)]
        drips = [threading.Thread(target=drip, args=(live.connect, TOKEN, 3)) for _ in range(4)]
        for each in drips:
            each.start()
        models = ("base", "law", "med")
        fuzzes = [
            Fuzz(live.connect, token=TOKEN, seed=seed, models=models, folder=str(tmp_path))
            for seed in range(4)
        ]
        healthy = []

        def work(fuzz):
            for number in range(125):
                fuzz.one()
                if number % 25 == 0:
                    healthy.append(live.is_healthy())

        threads = [threading.Thread(target=work, args=(fuzz,)) for fuzz in fuzzes]
        for each in threads:
            each.start()
        for each in [*threads, *drips]:
            each.join(60)
        for sock in idle:
            sock.close()
        assert [wrong for fuzz in fuzzes for wrong in fuzz.wrong] == []
        found = {status for fuzz in fuzzes for status in fuzz.statuses}
        assert {200, 400, 401, 404, 405} <= found
        assert healthy == [True] * 20
        assert live.settle()
        assert live.service.worker.batch.handles == []


class Served:
    """A process with a server over a real model and four adapters."""

    def __init__(self, folder, adapters):
        command = [sys.executable, str(SERVED), str(folder), str(adapters), TOKEN]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.port = json.loads(self.process.stdout.readline())["port"]
        while not self.is_healthy():
            time.sleep(0.1)

    def connect(self):
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def is_healthy(self):
        request = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
        try:
            with self.connect() as sock:
                sock.sendall(request)
                return read_answer(sock)[0] == 200
        except ConnectionError:
            return False

    def state(self):
        """What it holds, once nothing of it is a request in flight; or after ten seconds."""
        for _ in range(20):
            self.process.send_signal(signal.SIGUSR1)
            found = json.loads(self.process.stdout.readline())
            if not (found["held"] or found["has_work"]):
                break
            time.sleep(0.5)
        return found


@pytest.mark.torture
@pytest.mark.timeout(2400)
def test_20_000_requests_of_every_kind(tiny_model_folder, tmp_path, is_torture):
    """A real model, four adapters, slow clients and 64 idle ones all along."""
    if not is_torture:
        pytest.skip("`make torture` has it; the test above is its short version")
    num_requests = 20_000
    folder = tiny_model_folder("llama")
    for name in ("a", "b", "c", "d"):
        base, _ = load_base(str(folder), "float32")
        adapt(base, rank=4, alpha=8)
        write_adapter(base, tmp_path / name)
    served = Served(folder, tmp_path)
    try:
        fuzzes, healthy, states = _all_kinds(served, num_requests, tmp_path / "a")
        end = served.state()
        assert [wrong for fuzz in fuzzes for wrong in fuzz.wrong] == []
        assert all(healthy)
        assert (end["held"], end["has_work"]) == (0, False)
        warm = states[0]
        assert end["rss_mib"] - warm["rss_mib"] < 40
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(15) in (0, -signal.SIGTERM)
    finally:
        served.process.kill()
        served.process.wait()
        served.process.stdout.close()
    total: Counter[int] = Counter()
    for fuzz in fuzzes:
        total.update(fuzz.statuses)
    print("statuses", dict(sorted(total.items())))
    print("memory after a tenth, then at the end", warm, end, "checks of health", len(healthy))


def _all_kinds(served, num_requests, adapter):
    """The work of sixteen clients; what they saw, and the server's states on the way."""
    models = ("base", "a", "b", "c", "d")
    fuzzes = [
        Fuzz(served.connect, token=TOKEN, seed=seed, models=models, folder=str(adapter))
        for seed in range(16)
    ]
    is_over, healthy, states = threading.Event(), [], []

    def work(fuzz):
        for _ in range(num_requests // len(fuzzes)):
            fuzz.one()

    def stay(make):
        while not is_over.is_set():
            make()

    def idle():
        with served.connect() as sock:
            sock.settimeout(8)
            with suppress(OSError):
                sock.recv(1)

    slow = [lambda: drip(served.connect, TOKEN, 8)] * 4 + [idle] * 64
    background = [threading.Thread(target=stay, args=(make,)) for make in slow]
    threads = [threading.Thread(target=work, args=(fuzz,)) for fuzz in fuzzes]
    for each in [*background, *threads]:
        each.start()
    done_at_first = num_requests // 10
    while any(each.is_alive() for each in threads):
        healthy.append(served.is_healthy())
        done = sum(sum(fuzz.statuses.values()) for fuzz in fuzzes)
        if not states and done >= done_at_first:
            states.append(served.state())
        time.sleep(0.2)
    is_over.set()
    for each in background:
        each.join(20)
    return fuzzes, healthy, states or [served.state()]
