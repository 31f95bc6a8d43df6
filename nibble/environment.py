"""Settings of the libraries below torch, which they read from the environment on first use."""

import atexit
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# oneDNN keeps the compiled code of every matrix shape it meets, up to 1,024 of them in each of two
# caches: batches of ever new lengths would grow a process by some 20 MiB a step.
SHAPES_KEPT = "64"

_CACHES = {
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": SHAPES_KEPT,
    "LRU_CACHE_CAPACITY": SHAPES_KEPT,
}
# Threads that spin at barriers turn a step of 0.1 s into seconds on a busy machine; threads that
# sleep at once wake up late a thousand times a step. These look some ten microseconds, then sleep.
_WAITING = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "10000"}


def bound_caches() -> None:
    """Bound the caches of compiled matrix products; what the user has set stays."""
    for name, value in _CACHES.items():
        os.environ.setdefault(name, value)


def wait_passively() -> None:
    """Let idle threads sleep soon; takes effect only before torch is imported."""
    for name, value in _WAITING.items():
        os.environ.setdefault(name, value)


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import the large libraries in three quarters of the time: they leave no garbage to look for.

    What was imported is then left out of every later search.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        atexit.register(_unfreeze_for_triton)
        if was_enabled:
            gc.enable()


def _unfreeze_for_triton() -> None:
    """Let a last search find what Triton made: it prints what is left when a process ends."""
    if "triton" in sys.modules:
        gc.unfreeze()
