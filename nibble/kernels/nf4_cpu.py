"""The compiled 4-bit code for CPUs: built once by the system's C compiler, checked, then used.

The library stands in the user's cache folder under a name that holds the hash of its source, the
flags, the compiler and the CPU, so no stale or foreign build is ever loaded. Before its first use
in a process it must give the bits of `nf4_reference` on a small random weight. Without a compiler,
or on any disagreement, the reference is used and one warning says so.

Set NIBBLE_NO_COMPILE=1 to use the reference in any case.
"""

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from nibble.kernels.nf4_reference import (
    ASCENDING,
    CODEBOOKS,
    DYNAMIC_MAP,
    Quantized,
    bounds,
    decode_reference,
    encode_reference,
    quantize_scales,
)

SOURCE = Path(__file__).with_name("nf4_cpu.c")
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-std=c11", "-shared", "-fPIC")
COMPILE_TIMEOUT_S = 60
# Work below this many values is done by the calling thread alone.
VALUES_PER_THREAD = 1 << 18

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_logger = logging.getLogger("nibble")


class _Weight(ctypes.Structure):
    """`Weight` of nf4_cpu.c."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("codebook", ctypes.c_void_p),
        ("absmax", ctypes.c_void_p),
        ("map", ctypes.c_void_p),
        ("nested", ctypes.c_void_p),
        ("offset", ctypes.c_void_p),
        ("block_size", ctypes.c_int64),
    )


class Library:
    """The two operations of the compiled code; same signatures as the reference.

    Large work is split over `torch.get_num_threads()` threads; the result does not depend on it.

    Args:
        path: The shared library.

    Raises:
        OSError: If it cannot be loaded.
    """

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        pointer, int64, int32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        library.nibble_instructions.restype = ctypes.c_char_p
        library.nibble_decode.argtypes = [pointer, int64, int64, pointer, int32]
        library.nibble_decode.restype = None
        library.nibble_encode.argtypes = [
            *(pointer, int32, int64, int64),
            *(pointer, pointer, int32, pointer, pointer),
        ]
        library.nibble_encode.restype = None
        self._library = library
        self.instructions: str = library.nibble_instructions().decode()

    def encode(
        self,
        values: Tensor,
        codes: Tensor,
        scale_N: Tensor,
        *,
        type: str,
        block_size: int,
        measure: bool,
    ) -> None:
        """As `encode_reference`, for float32 and bfloat16."""
        bound, order = bounds(type), torch.tensor(ASCENDING[type], dtype=torch.uint8)
        kind = _KINDS[values.dtype]

        def work(first: int, stop: int) -> None:
            self._library.nibble_encode(
                values[first:].data_ptr(),
                kind,
                stop - first,
                block_size,
                bound.data_ptr(),
                order.data_ptr(),
                int(measure),
                scale_N[first // block_size :].data_ptr(),
                codes[first // 2 :].data_ptr(),
            )

        _split(work, values.numel(), block_size)

    def decode(self, q: Quantized, out_flat: Tensor, start: int) -> None:
        """As `decode_reference`."""
        weight = _Weight(
            q.codes.data_ptr(),
            CODEBOOKS[q.type].data_ptr(),
            q.absmax.data_ptr(),
            DYNAMIC_MAP.data_ptr(),
            None if q.nested_absmax is None else q.nested_absmax.data_ptr(),
            None if q.offset is None else q.offset.data_ptr(),
            q.block_size,
        )
        kind, address, width = _KINDS[out_flat.dtype], out_flat.data_ptr(), out_flat.itemsize

        def work(first: int, stop: int) -> None:
            self._library.nibble_decode(
                ctypes.byref(weight), start + first, stop - first, address + first * width, kind
            )

        _split(work, out_flat.numel(), q.block_size)


@cache
def load() -> Library | None:
    """The compiled code, or None where it cannot be built or does not agree."""
    if os.environ.get("NIBBLE_NO_COMPILE") == "1":
        return None
    try:
        library = _load_or_build()
    except (OSError, subprocess.SubprocessError) as error:
        _logger.warning(
            "4-bit weights use the slow torch reference: %s could not be compiled (%s); this needs "
            "a C compiler (gcc or clang) and a cache folder to write to (XDG_CACHE_HOME)",
            SOURCE.name,
            _reason(error),
        )
        return None
    if not agrees_with_reference(library):
        _logger.warning(
            "4-bit weights use the slow torch reference: the code compiled from %s gives other "
            "bits on this CPU; please report this",
            SOURCE.name,
        )
        return None
    return library


def implementation() -> str:
    """The path in use on this CPU, for reports."""
    library = load()
    return f"compiled C ({library.instructions})" if library else "torch reference"


def agrees_with_reference(library: Library) -> bool:
    """Whether encode and decode give the reference's bits on a small random weight."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(64 * 40 + 37, generator=generator)
    # One block of zeros, one huge value: the edges of the format.
    values[64:128], values[200] = 0, 3e4
    return all(
        _agrees(library, values.to(dtype), type)
        for type in CODEBOOKS
        for dtype in (torch.float32, torch.bfloat16)
    )


def _agrees(library: Library, values: Tensor, type: str) -> bool:
    num_blocks, num_bytes = -(-values.numel() // 64), (values.numel() + 1) // 2
    written = []
    for encode in (encode_reference, library.encode):
        codes, scale_N = torch.zeros(num_bytes, dtype=torch.uint8), torch.zeros(num_blocks)
        encode(values, codes, scale_N, type=type, block_size=64, measure=True)
        written.append((codes, scale_N))
    (codes, scale_N), (other_codes, other_scale_N) = written
    if not (torch.equal(codes, other_codes) and torch.equal(scale_N, other_scale_N)):
        return False
    q = Quantized(codes, *quantize_scales(scale_N), tuple(values.shape), type)
    for dtype in _KINDS:
        expected, got = torch.zeros(2, values.numel() - 3, dtype=dtype)
        decode_reference(q, expected, 3)
        library.decode(q, got, 3)
        if not torch.equal(expected, got):
            return False
    return True


def _load_or_build() -> Library:
    """The library of the cache folder; compiled now if it is absent or damaged."""
    compiler = _compiler()
    path = _cache_folder() / f"nf4_cpu-{_build_key(compiler)}.so"
    with contextlib.suppress(OSError):
        return Library(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written beside and renamed: other processes see no library or a whole one.
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        fresh = Path(folder) / path.name
        subprocess.run(
            [compiler, *FLAGS, str(SOURCE), "-o", str(fresh)],
            check=True,
            capture_output=True,
            text=True,
            timeout=COMPILE_TIMEOUT_S,
        )
        fresh.replace(path)
    return Library(path)


def _compiler() -> str:
    wanted = os.environ.get("CC") or "cc"
    for name in (wanted, "gcc", "clang"):
        found = shutil.which(name)
        if found:
            return found
    raise FileNotFoundError("no C compiler on the PATH")


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(root) if root else Path.home() / ".cache") / "nibble"
    except RuntimeError as error:
        raise FileNotFoundError("this user has no home folder") from error


def _build_key(compiler: str) -> str:
    """Hash of everything that the compiled code depends on."""
    version = subprocess.run(
        [compiler, "--version"], check=True, capture_output=True, timeout=COMPILE_TIMEOUT_S
    ).stdout
    parts = (SOURCE.read_bytes(), " ".join(FLAGS).encode(), compiler.encode(), version, _cpu())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:20]


def _cpu() -> bytes:
    """What -march=native looks at: model and feature flags where the system tells them."""
    lines = [platform.machine()]
    info = Path("/proc/cpuinfo")
    if info.exists():
        wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part")
        text = info.read_text(errors="replace").split("\n\n")[0]
        lines += [line for line in text.splitlines() if line.startswith(wanted)]
    else:
        lines.append(platform.processor())
    return "\n".join(lines).encode()


def _reason(error: Exception) -> str:
    """The last line that the compiler said, or the error itself."""
    said = getattr(error, "stderr", None)
    return said.strip().splitlines()[-1] if isinstance(said, str) and said.strip() else str(error)


def _split(work: Callable[[int, int], None], count: int, block_size: int) -> None:
    """Call `work(first, stop)` on parts of [0, count) that begin at block boundaries."""
    num_parts = min(torch.get_num_threads(), max(1, count // VALUES_PER_THREAD))
    if num_parts == 1:
        work(0, count)
        return
    size = -(-count // (num_parts * block_size)) * block_size
    parts = [(first, min(first + size, count)) for first in range(0, count, size)]
    futures = [_pool().submit(work, *part) for part in parts[1:]]
    work(*parts[0])
    for future in futures:
        future.result()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 1), "nibble-nf4")


# Threads do not survive a fork: a child starts its own.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)
