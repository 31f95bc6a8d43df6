"""The compiled 4-bit code: the bits of the reference, on every instruction set and thread."""

import logging
import platform
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import torch

from nibble.kernels import nf4, nf4_cpu
from nibble.kernels.compiled import FLAGS
from nibble.kernels.nf4_reference import Quantized, decode_reference
from nibble.kernels.nf4_search import search_reference

has_compiler = any(shutil.which(name) for name in ("cc", "gcc", "clang"))
needs_compiler = pytest.mark.skipif(not has_compiler, reason="needs a C compiler")
x86_64 = pytest.mark.skipif(platform.machine() != "x86_64", reason="needs an x86-64 CPU")


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """An empty cache folder and a loader that has not run."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("NIBBLE_NO_COMPILE", raising=False)
    nf4_cpu.load.cache_clear()
    yield tmp_path
    nf4_cpu.load.cache_clear()


def build(folder: Path, *flags: str) -> nf4_cpu.Library:
    # A name of its own: the loader gives a path that it knows already from memory.
    path = folder / f"library{len(list(folder.iterdir()))}.so"
    command = ["cc", *FLAGS, *nf4_cpu.FLAGS, *flags, str(nf4_cpu.SOURCE), "-o", str(path)]
    subprocess.run(command, check=True)
    return nf4_cpu.Library(path)


@needs_compiler
def test_name_says_what_is_in_use(fresh):
    assert nf4.implementation().startswith("compiled C (")


@needs_compiler
def test_code_that_gives_other_bits_is_not_used(fresh, monkeypatch, caplog):
    weight = torch.randn(1000)
    expected = nf4.quantize(weight)
    nf4_cpu.load.cache_clear()
    source, right = fresh / "nf4_cpu.c", "below += values[i] > bounds"
    text = nf4_cpu.SOURCE.read_text()
    assert right in text
    source.write_text(text.replace(right, "below += values[i] > 2 * bounds"))
    monkeypatch.setattr(nf4_cpu, "SOURCE", source)
    monkeypatch.setattr(logging.getLogger("nibble"), "propagate", True)
    got = nf4.quantize(weight)
    nf4.dequantize(got)
    assert torch.equal(got.codes, expected.codes)
    (record,) = [r for r in caplog.records if r.name == "nibble"]
    assert "4-bit weights use the slow torch reference" in record.getMessage()
    assert nf4.implementation() == "torch reference"


@pytest.fixture(
    params=[
        ("-march=native", None),
        pytest.param(("-march=x86-64-v3", "AVX2"), marks=x86_64),
        pytest.param(("-march=x86-64", "portable"), marks=x86_64),
    ],
    ids=lambda param: param[0],
)
def library(request, tmp_path):
    """The code built for one instruction set."""
    flag, instructions = request.param
    library = build(tmp_path, flag)
    assert instructions in (None, library.instructions)
    return library


@needs_compiler
def test_every_instruction_set_agrees(library):
    assert nf4_cpu.agrees_with_reference(library)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_at_the_edges_of_each_dtype(library, dtype):
    # Ties, subnormals, overflow, infinities and NaN, as scales of a block of code +1.
    scale_N = torch.tensor(
        [0.0, 1.00390625, 1.01171875, 1.00048828125, 1.00146484375, 65504.0, 65519.9, 65520.0, 1e5,
         3.39e38, 3.4028235e38, 6.1e-5, 4.3e-5, 5.9604645e-8, 2.9802322e-8, 2.98024e-8, 8.9e-8,
         1e-39, 9.2e-41, 1e-45, float("inf"), -float("inf"), float("nan"), 0.0]
    )  # fmt: skip
    scale_N[-1:].view(torch.int32)[0] = 0x7FFFFFFF  # NaN that overflows when it is rounded as bits
    codes = torch.full((scale_N.numel() * 32,), 0xF0, dtype=torch.uint8)
    q = Quantized(codes, scale_N, None, None, (scale_N.numel() * 64,))
    expected = torch.empty(q.shape, dtype=dtype)
    decode_reference(q, expected, 0)
    # By whole vectors, and one by one.
    got, single = torch.empty_like(expected), torch.empty_like(expected)
    library.decode(q, got, 0)
    for i in range(single.numel()):
        library.decode(q, single[i : i + 1], i)
    for values in (got, single):
        assert torch.equal(values.isnan(), expected.isnan())
        assert torch.equal(values.nan_to_num(nan=0.0), expected.nan_to_num(nan=0.0))


@needs_compiler
@pytest.mark.parametrize("type", ["nf4", "fp4"])
@pytest.mark.parametrize("block_size", [32, 64, 4096])
def test_search_gives_the_bits_of_the_reference(library, type, block_size):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(9 * block_size + 5, generator=generator)
    scale = torch.tensor([1.0, 1e-33, 1e33, 0.0, 1e-20, 1e20, 1e-40, 3e38, 0.02, 1.0])
    values = (values * scale.repeat_interleave(block_size)[: values.numel()]).clamp(-3e38, 3e38)
    for dtype in (torch.float32, torch.bfloat16):
        absmax_N = torch.stack([b.abs().max() for b in values.to(dtype).float().split(block_size)])
        expected_N, got_N = torch.full((2, 10), float("nan"))
        for search, scale_N in ((search_reference, expected_N), (library.search, got_N)):
            search(values.to(dtype), absmax_N, scale_N, type=type, block_size=block_size)
        assert torch.equal(got_N, expected_N)
        assert not torch.equal(got_N, absmax_N)


@needs_compiler
@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("search", [False, True])
def test_result_does_not_depend_on_threads(monkeypatch, num_threads, search):
    weight = torch.randn(601, 701)
    expected = nf4.quantize(weight, search=search)
    monkeypatch.setattr(nf4_cpu, "VALUES_PER_THREAD", 1 << 12)
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    got = nf4.quantize(weight, search=search)
    assert torch.equal(got.codes, expected.codes)
    assert torch.equal(got.absmax, expected.absmax)
    assert torch.equal(nf4.dequantize(got), nf4.dequantize_reference(expected))
    part = nf4.dequantize(got, start=12345, count=200_001)
    assert torch.equal(part, nf4.dequantize_reference(expected).view(-1)[12345:212346])


@needs_compiler
def test_works_from_several_threads_at_once():
    q = nf4.quantize(torch.randn(512, 512))
    expected = nf4.dequantize_reference(q)
    results = [torch.empty(512, 512, dtype=torch.bfloat16) for _ in range(4)]
    threads = [
        threading.Thread(target=nf4.dequantize, args=(q,), kwargs={"out": result})
        for result in results
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(result, expected) for result in results)
