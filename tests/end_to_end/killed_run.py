"""A run in a process of its own that may be killed at a fault point; see test_kills.py.

Its globals come from the test: `settings` of the run, `kill_at`, the number of the fault point at
which it dies or 0, and `points_file`, to which all points that were passed are written, or None.
"""

import os
import signal
from pathlib import Path

import torch

from nibble import api
from nibble.config import load_config
from nibble.disk import faults_at

passed = []


def die_at(name, *paths):
    passed.append(name)
    if len(passed) == kill_at:  # noqa: F821
        os.kill(os.getpid(), signal.SIGKILL)


torch.set_num_threads(1)
with faults_at(die_at):
    api.train(load_config(None, settings))  # noqa: F821
if points_file is not None:  # noqa: F821
    Path(points_file).write_text("\n".join(passed))  # noqa: F821
