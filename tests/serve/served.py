"""A server over a real model: python served.py MODEL ADAPTERS PORT.

On SIGUSR1 it prints, as JSON, what it holds and its memory.
"""

import json
import signal
import socket
import sys
from pathlib import Path

import psutil

from nibble.model.load import load_base
from nibble.serve.limits import Limits
from nibble.serve.start import Door, build_service, run_server

model, adapters, token = sys.argv[1:]
base, tokenizer = load_base(model, "float32")
folders = {folder.name: folder for folder in sorted(Path(adapters).iterdir())}
limits = Limits(read_seconds=5, new_tokens=100)
service = build_service(
    base,
    tokenizer,
    name="base",
    adapters=folders,
    limits=limits,
    max_tokens=limits.running * 512,
    folders=[Path(adapters)],
)
sock = socket.create_server(("127.0.0.1", 0))


def _tell(number, frame):
    worker = service.worker
    state = {
        "held": worker.num_held,
        "has_work": worker.batch.has_work(),
        "rss_mib": psutil.Process().memory_info().rss / 2**20,
        "files": psutil.Process().num_fds(),
        "threads": psutil.Process().num_threads(),
    }
    print(json.dumps(state), flush=True)


signal.signal(signal.SIGUSR1, _tell)
print(json.dumps({"port": sock.getsockname()[1]}), flush=True)
run_server(service, Door(sock, token, ("127.0.0.1", "localhost")))
