"""The compiled inner loops of `nf4` on a CPU.

`nf4_cpu.c` is built once with the system's C compiler into the user's cache folder, checked
against the torch reference, and then used; without a compiler the reference does the work.
NIBBLE_NO_COMPILE=1 forces the reference.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

_SOURCE = Path(__file__).with_name("nf4_cpu.c")
# No contraction: a scale is multiplied and rounded before anything is added to it.
_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fPIC", "-shared", "-pthread")
_TYPES = {torch.float32: 0, torch.bfloat16: 1}
_log = logging.getLogger("nibble")


def implementation() -> str:
    """Name of the code in use."""
    return "compiled C" if _library() is not None else "torch reference"


def dequantize(
    codes: Tensor, absmax: Tensor, out: Tensor, table: Tensor, block_size: int
) -> bool:
    """Write code times scale into `out`; False where the reference must do it.

    Shapes:
        codes: (ceil(n / 2),) uint8. absmax: (N,) float32. table: (16,). out: n values.
    """
    library = _library()
    if library is None or out.dtype not in _TYPES or not out.is_contiguous():
        return False
    library.nibble_decode(
        _pointer(codes),
        _pointer(absmax),
        _pointer(table),
        _pointer(out),
        ctypes.c_int64(out.numel()),
        ctypes.c_int64(block_size),
        _TYPES[out.dtype],
        torch.get_num_threads(),
    )
    return True


def encode(
    values: Tensor, absmax: Tensor, block_size: int, midpoints: Tensor, order: Tensor
) -> Tensor | None:
    """Packed codes of (n,) float32 values; None where the reference must do it."""
    library = _library()
    if library is None:
        return None
    codes = torch.empty((values.numel() + 1) // 2, dtype=torch.uint8)
    library.nibble_encode(
        _pointer(values),
        _pointer(absmax),
        _pointer(midpoints),
        _pointer(order),
        _pointer(codes),
        ctypes.c_int64(values.numel()),
        ctypes.c_int64(block_size),
        torch.get_num_threads(),
    )
    return codes


@functools.cache
def _library() -> ctypes.CDLL | None:
    if os.environ.get("NIBBLE_NO_COMPILE") == "1":
        return None
    try:
        library = ctypes.CDLL(str(_build()))
    except (OSError, subprocess.SubprocessError) as error:
        _log.warning("4-bit weights use the torch reference, which is slower: %s", error)
        return None
    if not _agrees(library):
        _log.warning("4-bit weights use the torch reference: the compiled code disagrees with it")
        return None
    return library


def _build() -> Path:
    """The compiled library; its name changes with the source, the flags and the processor."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        raise OSError("no C compiler found (cc)")
    identity = [_SOURCE.read_text(), *_FLAGS, compiler, platform.platform(), _processor()]
    digest = hashlib.sha256("\n".join(identity).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nibble"
    library = cache / f"nf4_{digest}.so"
    if not library.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            built = Path(folder) / library.name
            command = [compiler, *_FLAGS, "-o", str(built), str(_SOURCE), "-lm"]
            subprocess.run(command, check=True, capture_output=True, timeout=60)
            built.replace(library)
    return library


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _agrees(library: ctypes.CDLL) -> bool:
    """Whether a small case gives the values of the formula."""
    codes = torch.arange(256, dtype=torch.uint8)
    table, absmax = torch.linspace(-1, 1, 16), torch.linspace(0.1, 3, 8)
    place = torch.stack([codes >> 4, codes & 15], 1).flatten().int()
    wide = table[place] * absmax.repeat_interleave(64)
    for dtype, code in _TYPES.items():
        out = torch.empty(512, dtype=dtype)
        library.nibble_decode(
            _pointer(codes),
            _pointer(absmax),
            _pointer(table),
            _pointer(out),
            ctypes.c_int64(512),
            ctypes.c_int64(64),
            code,
            1,
        )
        if not torch.equal(out, wide.to(dtype)):
            return False
    return True


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
