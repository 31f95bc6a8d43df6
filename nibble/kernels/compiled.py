"""C code for CPUs: built once by the system's compiler, checked, then used.

A library stands in the user's cache folder under a name that holds the hash of its source, the
flags, the compiler and the CPU, so no stale or foreign build is ever loaded. Before its first use
in a process it must agree with its reference. Without a compiler, or on any disagreement, the
reference is used and one warning says so.

Set NIBBLE_NO_COMPILE=1 to use the references in any case.
"""

import contextlib
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch
from torch.utils._python_dispatch import _disable_current_modes

FLAGS = ("-O3", "-march=native", "-std=c11", "-Wno-psabi", "-shared", "-fPIC")
COMPILE_TIMEOUT_S = 60

Library = TypeVar("Library")
_logger = logging.getLogger("nibble")


def load_compiled(
    source: Path,
    flags: tuple[str, ...],
    wrap: Callable[[Path], Library],
    agrees: Callable[[Library], bool],
    *,
    what: str,
) -> Library | None:
    """The code compiled from a file, or None where it cannot be built or does not agree.

    Args:
        flags: Flags of the compiler beside `FLAGS`.
        wrap: Makes callable what stands at a path; OSError if it cannot be loaded.
        agrees: Whether it gives what its reference gives.
        what: What goes by the reference otherwise, in plural, for the warning.
    """
    if os.environ.get("NIBBLE_NO_COMPILE") == "1":
        return None
    try:
        library = _load_or_build(source, flags, wrap)
    except (OSError, subprocess.SubprocessError) as error:
        _logger.warning(
            "%s use the slow torch reference: %s could not be compiled (%s); this needs "
            "a C compiler (gcc or clang) and a cache folder to write to (XDG_CACHE_HOME)",
            what,
            source.name,
            _reason(error),
        )
        return None
    with _disable_current_modes():  # the check needs values, also where a plan has none
        is_right = agrees(library)
    if not is_right:
        _logger.warning(
            "%s use the slow torch reference: the code compiled from %s does not agree with it "
            "on this CPU; please report this",
            what,
            source.name,
        )
        return None
    return library


def in_parts(
    work: Callable[[int, int], None], count: int, block_size: int = 1, *, least: int
) -> None:
    """Call `work(first, stop)` on parts of [0, count), on `torch.get_num_threads()` threads.

    Args:
        block_size: Parts begin at multiples of this.
        least: No part but the last is smaller than this, if there is more than one.
    """
    num_parts = min(torch.get_num_threads(), max(1, count // least))
    if num_parts == 1:
        work(0, count)
        return
    size = -(-count // (num_parts * block_size)) * block_size
    parts = [(first, min(first + size, count)) for first in range(0, count, size)]
    futures = [_pool().submit(work, *part) for part in parts[1:]]
    try:
        work(*parts[0])
    finally:
        # Also after an error: nobody may write to tensors that are let go.
        wait(futures)
    for future in futures:
        future.result()


def _load_or_build(
    source: Path, flags: tuple[str, ...], wrap: Callable[[Path], Library]
) -> Library:
    """The library of the cache folder; compiled now if it is absent or damaged."""
    compiler = _compiler()
    path = _cache_folder() / f"{source.stem}-{_build_key(compiler, source, flags)}.so"
    with contextlib.suppress(OSError):
        return wrap(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written beside and renamed: other processes see no library or a whole one.
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        fresh = Path(folder) / path.name
        subprocess.run(
            [compiler, *FLAGS, *flags, str(source), "-o", str(fresh), "-lm"],
            check=True,
            capture_output=True,
            text=True,
            timeout=COMPILE_TIMEOUT_S,
        )
        fresh.replace(path)
    return wrap(path)


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


def _build_key(compiler: str, source: Path, flags: tuple[str, ...]) -> str:
    """Hash of everything that the compiled code depends on."""
    version = subprocess.run(
        [compiler, "--version"], check=True, capture_output=True, timeout=COMPILE_TIMEOUT_S
    ).stdout
    words = " ".join([*FLAGS, *flags, compiler])
    headers = [path.read_bytes() for path in sorted(source.parent.glob("*.h"))]
    parts = (source.read_bytes(), *headers, words.encode(), version, _cpu())
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


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 1), "nibble-compiled")


# Threads do not survive a fork: a child starts its own.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)
