"""One rank of a run, in a process of its own; see test_distributed.py.

Its globals come from the test: `settings` of the run, `environment` of the rank, `log` for what it
says, and `mishap`: nothing, or what happens to this rank once `after` steps are done.
"""

import os
import signal
import sys
import time

import torch

from nibble import api, disk
from nibble.config import load_config
from nibble.errors import NibbleError
from nibble.train import job, manifest

os.environ.update(environment)  # noqa: F821
descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)  # noqa: F821
os.dup2(descriptor, 2)
torch.set_num_threads(1)
steps_done = 0
token_loss = job.token_loss
kind, after = mishap or ("", -1)  # noqa: F821


def count_steps(name, *paths):
    global steps_done
    if name != "train.after_step":
        return
    steps_done += 1
    if steps_done == after and kind in ("SIGTERM", "SIGKILL", "SIGSTOP"):
        os.kill(os.getpid(), getattr(signal, kind))
    if steps_done == after and kind == "error":
        raise OSError(28, "no space left")


def spoilt_loss(model, batch, **options):
    loss, num_targets = token_loss(model, batch, **options)
    if steps_done == after and kind == "nan":
        loss = loss * float("nan")
    if steps_done == after and kind == "memory" and len(batch.row_ids) > 1:
        raise MemoryError
    if steps_done == after and kind == "no memory":
        raise MemoryError
    return loss, num_targets


job.token_loss = spoilt_loss
if kind == "code":
    manifest._code_digest = lambda: "0" * 64
if kind == "data":
    manifest.file_sha256 = lambda path: "0" * 64
code = 0
try:
    with disk.faults_at(count_steps):
        api.train(load_config(None, settings))  # noqa: F821
except NibbleError as error:
    print(f"{time.monotonic()} {error.exit_code} {error}", file=sys.stderr)
    code = error.exit_code
sys.stderr.flush()
os._exit(code)
