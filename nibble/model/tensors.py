"""Read single tensors out of safetensors files, without mapping them into memory; write files.

    file     8 bytes: length of the header | header in JSON | values
    header   {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, ...}

A mapped file would count towards the memory of the process, and a model that keeps views of it
would break when the file changes.

Source:
    https://github.com/huggingface/safetensors, section "Format" of the README.
"""

import json
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from math import prod
from operator import index
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nibble.disk import flush_file, write_file, write_piece
from nibble.errors import DiskError, ModelError
from nibble.model.folder import LARGEST_JSON_BYTES, parse_json

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# More dimensions or longer ones than any tensor has; the product of many would take minutes.
_MOST_DIMENSIONS = 16
_LONGEST_DIMENSION = 2**62
_FIX = "download the file again"
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_WRITTEN_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class Spec:
    """Type and shape of a tensor that is to be written."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Entry:
    """Where a file holds a tensor; `start` counts bytes from the beginning of the file."""

    path: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def rows(self, first: int, stop: int) -> "Entry":
        """Some rows of the tensor, seen as a matrix of its last dimension."""
        width = self.shape[-1] if self.shape else 1
        start = self.start + first * width * self.dtype.itemsize
        return replace(self, shape=(stop - first, width), start=start)


def read_entries(path: Path) -> dict[str, Entry]:
    """Every tensor of a safetensors file by name; the values are not read.

    Raises:
        ModelError: If the file is cut off or is not a safetensors file.
        DiskError: If it cannot be read.
    """
    header, first, size = _read_header(path)
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, value, first) for name, value in header.items()}
    _check_layout(path, entries, first=first, size=size)
    return entries


def read_metadata(path: Path) -> dict[str, str]:
    """The texts that stand beside the tensors; empty where there are none.

    Raises:
        ModelError, DiskError: As `read_entries`.
    """
    values = _read_header(path)[0].get("__metadata__")
    found = values if isinstance(values, dict) else {}
    return {key: value for key, value in found.items() if isinstance(value, str)}


def _read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header, where the values begin, and the size of the file."""
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):
            raise ModelError(f"{path} is no regular file", fix=_FIX)
        size = info.st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise ModelError(f"{path} is cut off or is no safetensors file", fix=_FIX)
            header = parse_json(file.read(min(length, LARGEST_JSON_BYTES + 1)))
    except OSError as error:
        raise DiskError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ModelError(f"{path} has a broken header: {error}", fix=_FIX) from None
    if not isinstance(header, dict):
        raise ModelError(f"{path} has a broken header: expected an object", fix=_FIX)
    return header, 8 + length, size


class TensorReader:
    """Reads tensors into memory of their own, or all into one buffer in turn."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        largest = max((entry.num_bytes for entry in entries), default=0)
        # One buffer for all: large blocks that come and go would leave holes in the heap.
        self._buffer = torch.empty(largest, dtype=torch.uint8)

    def read(self, entry: Entry) -> Tensor:
        """The tensor in memory of its own."""
        return _fill(torch.empty(entry.num_bytes, dtype=torch.uint8), entry)

    def borrow(self, entry: Entry) -> Tensor:
        """The tensor in the buffer, valid until the next call."""
        return _fill(self._buffer[: entry.num_bytes], entry)


def write_tensors(
    path: Path, tensors: Mapping[str, Sequence[Tensor]], metadata: Mapping[str, str] | None = None
) -> str:
    """Write a new file, flushed to the disk; returns its SHA-256.

    Args:
        tensors: Each in one or more pieces, on any device, which follow one another in the first
            dimension; a piece is copied only when it is written.

    Raises:
        OSError: If it cannot be written; what is there of the file is of no use.
    """
    specs = {
        name: Spec(pieces[0].dtype, tuple(joined_shape(pieces))) for name, pieces in tensors.items()
    }
    text, places = _lay_out(specs, metadata)
    values = (part for name in places for piece in tensors[name] for part in _bytes_of(piece))
    return write_file(path, chain([text], values))


@contextmanager
def tensor_file(
    path: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str] | None = None
) -> Iterator[Callable[[str, Iterable[Tensor]], None]]:
    """Within the block, `write(name, pieces)` fills a tensor of a new file, in any order.

    The pieces of a tensor follow one another in its flat order; one is in memory at a time. The
    file is flushed to the disk at the end.

    Raises:
        OSError: If it cannot be written; what is there of the file is of no use.
        ValueError: If pieces do not fill a tensor, or one was not written.
    """
    text, places = _lay_out(specs, metadata)
    missing = set(places)
    with path.open("xb", buffering=0) as file:
        write_piece(file.fileno(), path, text)

        def write(name: str, pieces: Iterable[Tensor]) -> None:
            file.seek(len(text) + places[name])
            num_bytes = 0
            for piece in pieces:
                if piece.dtype != specs[name].dtype:
                    raise ValueError(f"{name}: a piece of {piece.dtype}, not {specs[name].dtype}")
                num_bytes += piece.nbytes
                for part in _bytes_of(piece):
                    write_piece(file.fileno(), path, part)
            if num_bytes != specs[name].num_bytes:
                raise ValueError(f"{name}: {num_bytes} bytes, not {specs[name].num_bytes}")
            missing.discard(name)

        yield write
        if missing:
            raise ValueError(f"{path}: nothing was written for {sorted(missing)[:3]}")
        flush_file(file.fileno(), path)


def _lay_out(
    specs: Mapping[str, Spec], metadata: Mapping[str, str] | None
) -> tuple[bytes, dict[str, int]]:
    """The bytes before the values, and where each tensor starts among these, in their order."""
    # Wide types first: every tensor then starts at a multiple of its item size.
    names = sorted(specs, key=lambda name: (-specs[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    places: dict[str, int] = {}
    stop = 0
    for name in names:
        places[name], stop = stop, stop + specs[name].num_bytes
        header[name] = {
            "dtype": _NAMES[specs[name].dtype],
            "shape": list(specs[name].shape),
            "data_offsets": [places[name], stop],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, places


def joined_shape(pieces: Sequence[Tensor]) -> list[int]:
    """The shape of pieces that follow one another in the first dimension.

    >>> joined_shape([torch.zeros(2, 3), torch.zeros(4, 3)])
    [6, 3]
    """
    return [sum(len(piece) for piece in pieces), *pieces[0].shape[1:]]


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise ModelError if a floating-point tensor holds NaN or an infinite value."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    # The extremes carry NaN along, and unlike isfinite() need no memory.
    if not all(torch.isfinite(extreme) for extreme in torch.aminmax(tensor)):
        raise ModelError(
            f"the weight {name} holds NaN or infinite values",
            fix="download the checkpoint again, or repair the weight",
        )


def _check_layout(path: Path, entries: dict[str, Entry], *, first: int, size: int) -> None:
    """The values follow one another from the header to the end of the file, as the format asks."""
    spans = sorted((entry.start, entry.start + entry.num_bytes) for entry in entries.values())
    end = max((stop for _, stop in spans), default=first)
    if end > size:
        raise ModelError(f"{path} is cut off: it has {size} bytes, expected {end}", fix=_FIX)
    if end < size:
        raise ModelError(f"{path} has {size - end} bytes more than its header says", fix=_FIX)
    if any(start != stop for (_, stop), (start, _) in pairwise([(0, first), *spans])):
        raise ModelError(f"{path} has tensors that overlap or leave gaps", fix=_FIX)


def _entry(path: Path, name: str, value: Any, base: int) -> Entry:
    try:
        dtype, (start, stop) = _DTYPES[value["dtype"]], map(index, value["data_offsets"])
        shape = tuple(map(index, value["shape"]))
        if len(shape) > _MOST_DIMENSIONS or max(shape, default=0) > _LONGEST_DIMENSION:
            raise ValueError
        entry = Entry(path, name, dtype, shape, base + start)
    except (KeyError, TypeError, ValueError):
        raise ModelError(f"{path}: the header's entry for {name!r} is broken", fix=_FIX) from None
    if start < 0 or stop - start != entry.num_bytes or min(entry.shape, default=0) < 0:
        raise ModelError(f"{path}: size and shape of {name!r} do not agree", fix=_FIX)
    return entry


def _bytes_of(piece: Tensor) -> Iterator[memoryview]:
    values: Any = piece.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    whole = memoryview(values)
    for start in range(0, len(whole), _WRITTEN_AT_ONCE):
        yield whole[start : start + _WRITTEN_AT_ONCE]


def _fill(buffer: Tensor, entry: Entry) -> Tensor:
    values: Any = buffer.numpy()
    view, done = memoryview(values), 0
    try:
        with entry.path.open("rb", buffering=0) as file:
            file.seek(entry.start)
            while count := file.readinto(view[done:]):
                done += count
    except OSError as error:
        raise DiskError(f"{entry.path} cannot be read: {error.strerror}") from None
    if done < entry.num_bytes:
        raise ModelError(f"{entry.path} is cut off in {entry.name!r}", fix=_FIX)
    return buffer.view(entry.dtype).view(entry.shape)
