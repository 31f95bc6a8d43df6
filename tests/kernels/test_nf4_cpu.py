"""The compiled code: built once, checked, threaded, and replaced by the reference when it fails."""

import logging
import os
import platform
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from nibble.kernels import nf4, nf4_cpu
from nibble.kernels.nf4_reference import Quantized, decode_reference

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
    kept = [flag for flag in nf4_cpu.FLAGS if not flag.startswith(("-march", "-O"))]
    subprocess.run(["cc", *kept, *flags, str(nf4_cpu.SOURCE), "-o", str(path)], check=True)
    return nf4_cpu.Library(path)


@needs_compiler
def test_built_once_into_the_cache_folder(fresh):
    assert nf4_cpu.load() is not None
    (built,) = fresh.rglob("*.*")
    made_at = built.stat().st_mtime_ns
    nf4_cpu.load.cache_clear()
    assert nf4_cpu.load() is not None
    assert built.stat().st_mtime_ns == made_at
    assert nf4_cpu.implementation().startswith("compiled C")


@needs_compiler
def test_name_depends_on_source_flags_and_cpu(monkeypatch, tmp_path):
    compiler = nf4_cpu._compiler()
    keys = {nf4_cpu._build_key(compiler)}
    with monkeypatch.context() as patch:
        patch.setattr(nf4_cpu, "FLAGS", ("-O1",))
        keys.add(nf4_cpu._build_key(compiler))
    with monkeypatch.context() as patch:
        patch.setattr(nf4_cpu, "_cpu", lambda: b"another")
        keys.add(nf4_cpu._build_key(compiler))
    with monkeypatch.context() as patch:
        other = tmp_path / "nf4_cpu.c"
        other.write_text("/* another */")
        patch.setattr(nf4_cpu, "SOURCE", other)
        keys.add(nf4_cpu._build_key(compiler))
    assert len(keys) == 4


def test_environment_forces_the_reference(fresh, monkeypatch):
    monkeypatch.setenv("NIBBLE_NO_COMPILE", "1")
    assert nf4_cpu.load() is None
    assert nf4.implementation() == "torch reference"


def broken_source(folder: Path) -> Path:
    source = folder / "nf4_cpu.c"
    source.write_text("this is no C\n")
    return source


def disagreeing_source(folder: Path) -> Path:
    source = folder / "nf4_cpu.c"
    text = nf4_cpu.SOURCE.read_text()
    source.write_text(
        text.replace("below += values[i] > bounds", "below += values[i] > 2 * bounds")
    )
    return source


@needs_compiler
@pytest.mark.parametrize(
    ("make_source", "said"),
    [(broken_source, "could not be compiled"), (disagreeing_source, "gives other bits")],
)
def test_failure_falls_back_with_one_warning(fresh, monkeypatch, caplog, make_source, said):
    weight = torch.randn(1000)
    expected = nf4.quantize(weight)
    nf4_cpu.load.cache_clear()
    monkeypatch.setattr(nf4_cpu, "SOURCE", make_source(fresh))
    monkeypatch.setattr(logging.getLogger("nibble"), "propagate", True)
    got = nf4.quantize(weight)
    nf4.dequantize(got)
    assert torch.equal(got.codes, expected.codes)
    (record,) = [r for r in caplog.records if r.name == "nibble"]
    assert said in record.getMessage()
    assert nf4.implementation() == "torch reference"


def test_no_compiler_falls_back(fresh, monkeypatch, caplog):
    monkeypatch.setenv("PATH", str(fresh))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(logging.getLogger("nibble"), "propagate", True)
    assert nf4_cpu.load() is None
    assert "no C compiler" in caplog.text


def test_user_without_a_home_falls_back(fresh, monkeypatch, caplog):
    def fail() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(nf4_cpu.Path, "home", fail)
    monkeypatch.setattr(nf4_cpu, "_compiler", lambda: sys.executable)
    monkeypatch.setattr(logging.getLogger("nibble"), "propagate", True)
    assert nf4_cpu.load() is None
    assert "no home folder" in caplog.text


def test_cache_folder_that_cannot_be_made_falls_back(fresh, monkeypatch, caplog):
    (fresh / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(fresh / "file"))
    monkeypatch.setattr(nf4_cpu, "_compiler", lambda: sys.executable)
    monkeypatch.setattr(logging.getLogger("nibble"), "propagate", True)
    assert nf4_cpu.load() is None
    assert "XDG_CACHE_HOME" in caplog.text


@needs_compiler
def test_damaged_library_is_built_again(fresh):
    path = fresh / "nibble" / f"nf4_cpu-{nf4_cpu._build_key(nf4_cpu._compiler())}.so"
    path.parent.mkdir()
    path.write_bytes(b"\x7fELF")
    assert nf4_cpu.load() is not None
    assert path.stat().st_size > 4


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
    library = build(tmp_path, "-O3", flag)
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
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_result_does_not_depend_on_threads(monkeypatch, num_threads):
    weight = torch.randn(601, 701)
    expected = nf4.quantize(weight)
    monkeypatch.setattr(nf4_cpu, "VALUES_PER_THREAD", 1 << 12)
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    got = nf4.quantize(weight)
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


@needs_compiler
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_works_in_a_forked_child():
    program = """
import os, torch
torch.set_num_threads(1)  # torch's own threads do not survive a fork
torch.get_num_threads = lambda: 2
from nibble.kernels import nf4
q = nf4.quantize(torch.randn(1024, 1024))
expected = nf4.dequantize(q)
pid = os.fork()
if pid == 0:
    os._exit(0 if torch.equal(nf4.dequantize(q), expected) else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", program], timeout=120, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


@needs_compiler
def test_two_processes_build_at_once(tmp_path):
    program = "from nibble.kernels import nf4_cpu; raise SystemExit(nf4_cpu.load() is None)"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "NIBBLE_NO_COMPILE": ""}
    running = [subprocess.Popen([sys.executable, "-c", program], env=environment) for _ in range(2)]
    assert [process.wait(120) for process in running] == [0, 0]
    assert len(list(tmp_path.rglob("*.so"))) == 1
