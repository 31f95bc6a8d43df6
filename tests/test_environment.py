"""What the libraries below torch are told."""

import os
import subprocess
import sys

import pytest

from nibble import environment

GROWTH = """
import nibble, psutil, torch
weight = torch.ones(384, 1024, dtype=torch.bfloat16)
def meet(lengths):
    for length in lengths:
        torch.nn.functional.linear(torch.ones(length, 1024, dtype=torch.bfloat16), weight)
    return psutil.Process().memory_info().rss
print(meet(range(400, 600)), meet(range(600, 800)))
"""


def test_what_the_user_has_set_stays(monkeypatch):
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    environment.bound_caches()
    assert os.environ["LRU_CACHE_CAPACITY"] == "7"
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == environment.SHAPES_KEPT


def test_new_shapes_of_products_do_not_grow_the_process_for_ever():
    inherited = {k: v for k, v in os.environ.items() if not k.endswith("CACHE_CAPACITY")}
    done = subprocess.run(
        [sys.executable, "-c", GROWTH], env=inherited, capture_output=True, text=True, check=True
    )
    before, after = map(int, done.stdout.split())
    assert after - before < 30_000_000


def test_triton_has_nothing_to_complain_of_at_the_end():
    pytest.importorskip("triton")
    code = (
        "from nibble.environment import quick_imports\n"
        "with quick_imports():\n    import triton, torch._dynamo.utils"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not done.stderr
