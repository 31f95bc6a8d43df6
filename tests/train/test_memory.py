"""Peak memory of this process, what is free, and a heap without holes."""

import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from nibble.train import memory
from nibble.train.memory import PeakMemory, available_bytes

CPU = torch.device("cpu")
MB = 10**6
GIB = 2**30

# Blocks of 1 MB, every tenth of them with something small above it that stays.
HEAP = """
import sys
import psutil
import torch
from nibble.train.memory import keep_heap_dense

def resident():
    return psutil.Process().memory_info().rss

if sys.argv[1] == "dense":
    assert keep_heap_dense() is True
first = torch.ones(2_000_000)
del first  # from here on glibc takes blocks of up to 8 MB from the heap
before = resident()
blocks, small = [], []
for number in range(200):
    blocks.append(torch.ones(250_000))
    if number % 10 == 9:
        small.append(torch.ones(10_000))
held = resident() - before
blocks.clear()
print(held, resident() - before)
"""


# A process of its own: what other tests left may be freed at any time and would be subtracted.
LARGE_TENSOR = """
import torch
from nibble.train.memory import PeakMemory

peak = PeakMemory(torch.device("cpu"))
held = torch.ones(25_000_000)
while_held = peak.bytes()
del held
print(while_held, peak.bytes())
"""


class TestPeak:
    def test_it_sees_a_large_tensor_and_remembers_it(self):
        words = [sys.executable, "-c", LARGE_TENSOR]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        assert all(95 * MB <= peak <= 120 * MB for peak in map(int, done.stdout.split()))

    @pytest.mark.skipif(
        not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak cannot be set back here"
    )
    def test_what_was_held_before_does_not_count(self):
        held = torch.ones(25 * MB)
        peak = PeakMemory(CPU)
        found = peak.bytes()
        assert held.sum() == 25 * MB
        assert found <= 50 * MB

    def test_it_is_never_negative(self):
        held = torch.ones(25 * MB)
        peak = PeakMemory(CPU)
        del held
        assert peak.bytes() >= 0

    def test_without_proc_it_is_that_of_the_whole_process(self, monkeypatch, tmp_path):
        monkeypatch.setattr(memory, "_STATUS", tmp_path / "none")
        monkeypatch.setattr(memory, "_CLEAR_REFS", tmp_path / "none" / "none")
        peak = PeakMemory(CPU)
        held = torch.ones(25 * MB)
        assert peak.bytes() >= 0
        assert memory._high_water_mark() >= held.nbytes


class TestAvailable:
    @pytest.fixture(autouse=True)
    def machine(self, monkeypatch):
        free = SimpleNamespace(available=8 * GIB)
        monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: free)

    @pytest.fixture
    def groups(self, tmp_path, monkeypatch):
        """Files of a control group of version 2 and of version 1, from their texts."""

        def write(**texts):
            for name, text in texts.items():
                (tmp_path / name).write_text(text)
            pairs = [("max", "current"), ("limit", "usage")]
            files = tuple((str(tmp_path / a), str(tmp_path / b)) for a, b in pairs)
            monkeypatch.setattr(memory, "_CONTROL_GROUP_FILES", files)

        return write

    @pytest.mark.parametrize(
        ("texts", "expected"),
        [
            ({}, 8 * GIB),
            ({"max": f"{3 * GIB}\n", "current": f"{GIB}\n"}, 2 * GIB),
            ({"max": "max\n", "current": f"{GIB}\n"}, 8 * GIB),
            ({"max": f"{32 * GIB}\n", "current": f"{GIB}\n"}, 8 * GIB),
            ({"limit": f"{5 * GIB}\n", "usage": f"{GIB}\n"}, 4 * GIB),
            # What version 1 says where there is no limit.
            ({"limit": "9223372036854771712\n", "usage": f"{GIB}\n"}, 8 * GIB),
            ({"max": f"{3 * GIB}\n"}, 8 * GIB),
            ({"max": "", "current": ""}, 8 * GIB),
        ],
    )
    def test_the_tighter_of_machine_and_control_group(self, groups, texts, expected):
        groups(**texts)
        assert available_bytes(CPU) == expected


def test_this_machine_has_memory():
    assert 0 < available_bytes(CPU) <= memory.psutil.virtual_memory().total


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_a_dense_heap_gives_freed_blocks_back():
    left = {}
    for mode in ("usual", "dense"):
        command = [sys.executable, "-c", HEAP, mode]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        held, left[mode] = map(int, done.stdout.split())
        assert held >= 190 * MB
    assert left["dense"] <= 40 * MB
    assert left["dense"] <= left["usual"]


@pytest.mark.parametrize("error", [OSError, AttributeError, TypeError])
def test_a_library_without_the_switch_says_no(monkeypatch, error):
    def load(name):
        raise error

    monkeypatch.setattr(memory.ctypes, "CDLL", load)
    assert memory.keep_heap_dense() is False


def test_a_run_is_roomy_up_to_its_share_of_the_free_memory(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda device: 1000)
    most = round(1000 * memory.ROOMY_SHARE)
    assert memory.is_roomy(most)
    assert not memory.is_roomy(most + 1)
