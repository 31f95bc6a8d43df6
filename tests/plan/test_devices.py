"""Devices by name, by amount of memory, and the one that is here."""

import contextlib
import doctest
import re
import subprocess
import sys
from dataclasses import replace
from decimal import Decimal

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nibble.errors import UsageError
from nibble.plan import devices as module
from nibble.plan.devices import (
    DEVICES,
    find_device,
    measure_cpu,
    parse_memory,
    with_measured_rates,
)

GIB = 2**30
FACTORS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
FACTORS |= {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
FACTORS |= {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class TestTable:
    @pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
    def test_figures_are_sane(self, device):
        assert device.type == "cuda"
        assert device.count == 1
        assert GIB <= device.memory_bytes <= 400 * GIB
        assert 1e13 < device.flops < 1e16
        assert 1e11 < device.bandwidth < 2e13
        assert 1e10 < device.host_link < device.bandwidth
        # A product of two bf16 matrices needs some work per byte on every card.
        assert 50 < device.flops / device.bandwidth < 500
        assert re.fullmatch(r"\d+\.\d", device.capability)
        assert 2017 <= device.year <= 2026
        assert device.price_per_hour is None or 0.1 <= device.price_per_hour <= 20
        assert device.source.startswith("NVIDIA ")

    def test_names_are_unique(self):
        squeezed = {re.sub(r"[^a-z0-9]", "", device.name.lower()) for device in DEVICES}
        assert len(squeezed) == len(DEVICES) == 36

    @pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
    def test_every_name_is_found(self, device):
        dashed = device.name.replace(" ", "-")
        for name in (device.name, device.name.lower(), dashed, f"NVIDIA {device.name}"):
            assert find_device(name) == device
        assert find_device(f"4x {device.name}") == replace(device, count=4)

    def test_only_volta_and_turing_have_no_bf16(self):
        older = {device.name for device in DEVICES if "float16" in device.source}
        assert older == {d.name for d in DEVICES if float(d.capability) < 8.0}

    def test_memory_is_close_to_the_name(self):
        for device in DEVICES:
            stated = re.search(r"(\d+)GB", device.name)
            if stated:
                assert device.memory_bytes == pytest.approx(int(stated[1]) * GIB, rel=0.01)


class TestFindDevice:
    @pytest.mark.parametrize(
        ("text", "name", "count"),
        [
            ("rtx 4090", "RTX 4090", 1),
            ("RTX-4090", "RTX 4090", 1),
            (" 4090 ", "RTX 4090", 1),
            ("RTX 4090 24GB", "RTX 4090", 1),
            ("8x4090", "RTX 4090", 8),
            ("2 × a100-80g", "A100 80GB", 2),
            ("2x A100 80GB", "A100 80GB", 2),
            ("3080", "RTX 3080 10GB", 1),
            ("a10", "A10", 1),
            ("a10g", "A10G", 1),
            ("6000 ada", "RTX 6000 Ada", 1),
            ("pro 6000", "RTX PRO 6000 Blackwell", 1),
            ("v100 16 GiB", "V100 16GB", 1),
            ("H100", "H100 SXM 80GB", 1),
            ("h100 94gb", "H100 NVL", 1),
            ("H100 PCIe 80GB", "H100 PCIe", 1),
            ("b200 180GB", "B200", 1),
            ("gh200", "GH200 96GB", 1),
            # As nvidia-smi shows them.
            ("NVIDIA GeForce RTX 4090", "RTX 4090", 1),
            ("NVIDIA H100 80GB HBM3", "H100 SXM 80GB", 1),
            ("NVIDIA A100-SXM4-40GB", "A100 40GB", 1),
            ("NVIDIA A100 80GB PCIe", "A100 80GB", 1),
            ("Tesla V100-SXM2-32GB", "V100 32GB", 1),
            ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada", 1),
            (
                "NVIDIA RTX PRO 6000 Blackwell Workstation Edition",
                "RTX PRO 6000 Blackwell",
                1,
            ),
            ("NVIDIA GH200 480GB", "GH200 96GB", 1),
        ],
    )
    def test_names(self, text, name, count):
        found = find_device(text)
        assert (found.name, found.count) == (name, count)
        assert found.flops > 0

    @pytest.mark.parametrize(
        ("text", "named"),
        [("A100", ("A100 40GB", "A100 80GB")), ("2x v100", ("V100 16GB", "V100 32GB"))],
    )
    def test_an_ambiguous_name_lists_what_it_fits(self, text, named):
        with pytest.raises(UsageError) as caught:
            find_device(text)
        assert all(name in str(caught.value) for name in named)

    @pytest.mark.parametrize(
        "text",
        [
            *("RTX 20", "h1", "80GB A100 x", "4070 Ti", "4080 Super", "4060 Ti 8GB", "RTX 6000"),
            *("RTX 4090 16GB", "RTX 4090 Laptop GPU", "H200 NVL", "MI300X", "rtx", "5070Ti", "x"),
        ],
    )
    def test_another_product_is_not_taken_for_one_of_the_table(self, text):
        with pytest.raises(UsageError, match="unknown device") as caught:
            find_device(text)
        assert "--memory takes an amount" in caught.value.fix

    def test_a_slip_is_answered_with_a_question(self):
        with pytest.raises(UsageError, match='did you mean "RTX 4090"'):
            find_device("4091")
        with pytest.raises(UsageError, match='did you mean "RTX 3090"'):
            find_device("RXT 3090")

    @pytest.mark.parametrize(
        ("text", "name", "memory", "count"),
        [
            ("24GiB", "a GPU of 24 GiB", 24 * GIB, 1),
            ("24 G", "a GPU of 24 GiB", 24 * GIB, 1),
            ("8gb", "a GPU of 8 GB", 8 * 10**9, 1),
            ("4x 22.5 GiB", "a GPU of 22.5 GiB", 45 * GIB // 2, 4),
        ],
    )
    def test_an_amount_is_a_gpu_of_unknown_rates(self, text, name, memory, count):
        found = find_device(text)
        assert (found.name, found.memory_bytes, found.count) == (name, memory, count)
        assert (found.type, found.price_per_hour) == ("cuda", None)
        assert found.flops == found.bandwidth == found.host_link == 0.0
        assert with_measured_rates(found) == found

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("24", "has no unit"),
            ("24Gb", "in bits"),
            ("-3GiB", "not an amount"),
            ("24GBX", "unknown unit"),
            ("0", "is nothing"),
            ("0GiB", "is nothing"),
            ("0x 4090", "count is 0"),
            ("2x", "count goes with"),
            ("2x cpu", "count goes with"),
            ("2x here", "count goes with"),
        ],
    )
    def test_malformed_texts(self, text, message):
        with pytest.raises(UsageError, match=message) as caught:
            find_device(text)
        assert caught.value.fix

    @given(st.text(max_size=20))
    def test_any_text_is_a_device_or_a_usage_error(self, text):
        with contextlib.suppress(UsageError):
            assert find_device(f"{text}?").memory_bytes > 0


class TestHere:
    def test_cpu(self):
        found = find_device("CPU")
        assert (found.type, found.capability, found.count) == ("cpu", "", 1)
        assert found.memory_bytes == psutil.virtual_memory().total
        assert found.flops == found.bandwidth == found.host_link == 0.0

    @pytest.mark.parametrize("text", ["here", "", " "])
    def test_without_cuda_it_is_the_cpu(self, monkeypatch, text):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert find_device(text) == find_device("cpu")

    def test_a_known_card_has_the_rates_of_the_table_and_its_own_memory(self, monkeypatch):
        _pretend(monkeypatch, ["NVIDIA GeForce RTX 4090"] * 2, 24_217 * 2**20)
        found = find_device("here")
        expected = replace(find_device("4090"), memory_bytes=24_217 * 2**20, count=2)
        assert replace(found, host_memory_bytes=None) == expected
        assert found.host_memory_bytes == psutil.virtual_memory().total

    def test_memory_tells_cards_of_one_name_apart(self, monkeypatch):
        _pretend(monkeypatch, ["NVIDIA GeForce RTX 4060 Ti"], 15_966 * 2**20)
        assert find_device("here").name == "RTX 4060 Ti 16GB"
        _pretend(monkeypatch, ["NVIDIA GeForce RTX 4060 Ti"], 7_800 * 2**20)
        assert find_device("here").flops == 0.0

    def test_an_unknown_card_has_unknown_rates(self, monkeypatch):
        _pretend(monkeypatch, ["NVIDIA RTX 4090 Laptop GPU", "NVIDIA L4"], 16 * GIB)
        found = find_device("here")
        assert (found.name, found.count) == ("NVIDIA RTX 4090 Laptop GPU", 1)
        assert (found.flops, found.capability, found.memory_bytes) == (0.0, "8.9", 16 * GIB)

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_the_device_that_is_here(self):
        found = find_device("here")
        assert found.count == torch.cuda.device_count()
        assert found.memory_bytes == torch.cuda.mem_get_info(0)[1]


class TestMeasure:
    def test_rates_of_this_cpu(self):
        flops, bandwidth = measure_cpu(seconds=0.02)
        assert 1e8 < flops < 1e14
        assert 1e8 < bandwidth < 1e13

    def test_only_a_cpu_of_unknown_rates_is_measured(self, monkeypatch):
        monkeypatch.setattr(module, "measure_cpu", lambda: (2e11, 3e10))
        measured = with_measured_rates(find_device("cpu"))
        assert (measured.flops, measured.bandwidth, measured.host_link) == (2e11, 3e10, 3e10)
        monkeypatch.setattr(module, "measure_cpu", lambda: pytest.fail("measured again"))
        assert with_measured_rates(measured) is measured
        assert with_measured_rates(find_device("L4")) == find_device("L4")


class TestParseMemory:
    @given(st.integers(1, 10**6), st.sampled_from(sorted(FACTORS)), st.sampled_from(["", " "]))
    def test_whole_numbers(self, number, unit, space):
        assert parse_memory(f"{number}{space}{unit}") == number * FACTORS[unit]

    @given(st.decimals("0.01", 10**6, places=2), st.sampled_from(sorted(FACTORS)))
    def test_decimals_are_exact_and_rounded_down(self, number, unit):
        assert parse_memory(f"{number:f}{unit}") == int(Decimal(number) * FACTORS[unit])

    @given(st.integers(1, 10**6), st.sampled_from(sorted(FACTORS)))
    def test_case_does_not_matter(self, number, unit):
        expected = number * FACTORS[unit]
        assert parse_memory(f"{number}{unit.lower()}") == expected
        assert parse_memory(f"{number}{unit.upper()}") == expected

    @given(st.integers(1, 2**50))
    def test_the_name_of_a_gpu_keeps_the_amount(self, number):
        device = find_device(f"{number % 10**9 + 1}KiB")
        assert parse_memory(device.name.removeprefix("a GPU of ")) == device.memory_bytes

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("24", "has no unit"),
            ("24Gb", "in bits"),
            ("24Gib", "in bits"),
            ("24 gbit", "in bits"),
            ("24Gbits", "in bits"),
            ("24TBB", 'unknown unit "TBB"'),
            ("24B", "unknown unit"),
            ("24PB", "unknown unit"),
            ("-3GiB", "not an amount"),
            ("1,5GiB", "not an amount"),
            ("1e3MiB", "not an amount"),
            ("infGiB", "not an amount"),
            ("٣GiB", "not an amount"),
            ("9" * 5000 + "GiB", "not an amount"),
            ("GiB", "not an amount"),
            ("", "not an amount"),
            ("0GiB", "is nothing"),
            ("0.0001KB", "less than one byte"),
        ],
    )
    def test_malformed_amounts_say_what_is_expected(self, text, message):
        with pytest.raises(UsageError, match=message) as caught:
            parse_memory(text)
        assert f'"{text}"' in caught.value.what
        assert "24GiB" in caught.value.fix


def test_examples():
    assert doctest.testmod(module) == (0, 1)


def test_names_need_no_torch():
    code = (
        "import sys\n"
        "from nibble.plan.devices import find_device\n"
        "assert find_device('2x 4090').count == 2 and find_device('cpu').memory_bytes\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _pretend(monkeypatch, names, memory_bytes):
    """CUDA devices of these names, each of this memory."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: names[index])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (memory_bytes // 2, memory_bytes))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 9))
