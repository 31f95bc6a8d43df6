"""C code: built once, checked, threaded, and replaced by the reference when it fails."""

import ctypes
import logging
import os
import shutil
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from nibble.kernels import compiled, layers_cpu, nf4_cpu
from nibble.kernels.compiled import in_parts, load_compiled

has_compiler = any(shutil.which(name) for name in ("cc", "gcc", "clang"))
needs_compiler = pytest.mark.skipif(not has_compiler, reason="needs a C compiler")


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache folder."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.delenv("NIBBLE_NO_COMPILE", raising=False)
    monkeypatch.setattr(logging.getLogger("nibble"), "propagate", True)
    return folder


@pytest.fixture
def source(tmp_path):
    path = tmp_path / f"answer_{tmp_path.name}.c"
    path.write_text("int answer(void) { return 42; }\n")
    return path


def load(source: Path, *, expected=42, flags=()):
    return load_compiled(
        source,
        flags,
        lambda path: ctypes.CDLL(str(path)),
        lambda library: library.answer() == expected,
        what="answers",
    )


@needs_compiler
def test_built_once_into_the_cache_folder(cache, source):
    assert load(source) is not None
    (built,) = cache.rglob("*.*")
    made_at = built.stat().st_mtime_ns
    assert load(source) is not None
    assert built.stat().st_mtime_ns == made_at


@needs_compiler
def test_name_depends_on_source_flags_and_cpu(monkeypatch, cache, source):
    load(source)
    load(source, flags=("-O1",))
    with monkeypatch.context() as patch:
        patch.setattr(compiled, "_cpu", lambda: b"another")
        load(source)
    source.write_text(source.read_text() + "/* another */\n")
    load(source)
    assert len(list(cache.rglob("*.so"))) == 4


def test_environment_forces_the_reference(cache, source, monkeypatch, caplog):
    monkeypatch.setenv("NIBBLE_NO_COMPILE", "1")
    assert load(source) is None
    assert not caplog.records


@needs_compiler
def test_what_does_not_compile_falls_back_with_one_warning(cache, source, caplog):
    source.write_text("this is no C\n")
    assert load(source) is None
    (record,) = caplog.records
    assert "answers use the slow torch reference" in record.getMessage()
    assert "could not be compiled" in record.getMessage()


@needs_compiler
def test_what_does_not_agree_falls_back_with_one_warning(cache, source, caplog):
    assert load(source, expected=43) is None
    (record,) = caplog.records
    assert "answers use the slow torch reference" in record.getMessage()
    assert "does not agree" in record.getMessage()


def test_no_compiler_falls_back(cache, source, monkeypatch, caplog):
    monkeypatch.setenv("PATH", str(cache))
    monkeypatch.delenv("CC", raising=False)
    assert load(source) is None
    assert "no C compiler" in caplog.text


def test_user_without_a_home_falls_back(cache, source, monkeypatch, caplog):
    def fail() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(compiled.Path, "home", fail)
    monkeypatch.setattr(compiled, "_compiler", lambda: sys.executable)
    assert load(source) is None
    assert "no home folder" in caplog.text


def test_cache_folder_that_cannot_be_made_falls_back(cache, source, monkeypatch, caplog):
    cache.touch()
    monkeypatch.setattr(compiled, "_compiler", lambda: sys.executable)
    assert load(source) is None
    assert "XDG_CACHE_HOME" in caplog.text


@needs_compiler
def test_damaged_library_is_built_again(cache, source):
    path = (
        cache
        / "nibble"
        / f"{source.stem}-{compiled._build_key(compiled._compiler(), source, ())}.so"
    )
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\x7fELF")
    assert load(source) is not None
    assert path.stat().st_size > 4


@needs_compiler
def test_two_processes_build_at_once(tmp_path):
    program = "from nibble.kernels import nf4_cpu; raise SystemExit(nf4_cpu.load() is None)"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "NIBBLE_NO_COMPILE": ""}
    running = [subprocess.Popen([sys.executable, "-c", program], env=environment) for _ in range(2)]
    assert [process.wait(120) for process in running] == [0, 0]
    assert len(list(tmp_path.rglob("*.so"))) == 1


@needs_compiler
@pytest.mark.parametrize("module", [nf4_cpu, layers_cpu])
def test_every_source_compiles_without_warnings(module, tmp_path):
    flags = [*compiled.FLAGS, *module.FLAGS, "-Wall", "-Wextra", "-Werror"]
    command = ["cc", *flags, str(module.SOURCE), "-o", str(tmp_path / "l.so"), "-lm"]
    subprocess.run(command, check=True)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize(("count", "block_size", "least"), [(100, 1, 7), (100, 8, 30), (3, 4, 9)])
def test_parts_are_whole_blocks_and_cover_all(monkeypatch, num_threads, count, block_size, least):
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    parts = []
    in_parts(lambda first, stop: parts.append((first, stop)), count, block_size, least=least)
    parts.sort()
    assert parts[0][0] == 0
    assert parts[-1][1] == count
    assert all(stop == first for (_, stop), (first, _) in pairwise(parts))
    assert all(first % block_size == 0 for first, _ in parts)
    assert len(parts) <= max(1, min(num_threads, count // least))


def test_an_error_in_a_part_is_raised(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)

    def work(first: int, stop: int) -> None:
        if first > 0:
            raise MemoryError("in the second part")

    with pytest.raises(MemoryError, match="second part"):
        in_parts(work, 10, least=1)


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


def test_an_error_of_one_part_waits_for_the_others(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    ended = []

    def work(first, stop):
        if first == 0:
            raise MemoryError
        time.sleep(0.2)
        ended.append(stop)

    with pytest.raises(MemoryError):
        compiled.in_parts(work, 2, least=1)
    assert ended == [2]
