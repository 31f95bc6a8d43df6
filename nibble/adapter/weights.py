"""The weights of a base on disk, each with its update, read some rows at a time.

    disk     one tensor, or those of every expert, which make one parameter of the model
    matrix   the parameter seen as (rows, I); its sources are runs of rows

Nothing here holds more than one block of rows, but for weights in 4 bits, of which the codes of
one are held.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from nibble.adapter.updates import Update
from nibble.errors import ModelError
from nibble.kernels.nf4 import Quantized, dequantize, quantize_parts
from nibble.model.names import Target
from nibble.model.tensors import Entry, TensorReader

# Values of float32 in memory at once: 8 MiB.
BLOCK_VALUES = 1 << 21
_READER = TensorReader([])


@dataclass(frozen=True)
class Weight:
    """A parameter of the model as the disk holds it.

    Args:
        name: Its name in the model.
        shape: Its shape there.
        sources: The tensors that make it, with the first row of each.
        update: What the adapter adds; None leaves it as it is.
        is_low_bit: Whether QLoRA keeps it in 4 bits.
        stored: Where the disk holds it in 4 bits, the parts beside the codes.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[tuple[int, Entry], ...]
    update: Update | None = None
    is_low_bit: bool = False
    stored: Mapping[str, Entry] | None = None

    @property
    def width(self) -> int:
        """Columns of the matrix."""
        return self.shape[-1] if self.shape else 1

    @property
    def num_rows(self) -> int:
        """Rows of the matrix."""
        return prod(self.shape) // self.width

    def rows_of(self, source: int) -> tuple[int, int]:
        """First row and end of a source."""
        starts = [start for start, _ in self.sources]
        return starts[source], [*starts[1:], self.num_rows][source]

    def read(self, first: int, stop: int) -> Tensor:
        """Rows as they are stored, (stop - first, width)."""
        pieces = []
        for number, (start, entry) in enumerate(self.sources):
            begin, end = max(first, start), min(stop, self.rows_of(number)[1])
            if begin < end:
                pieces.append(_READER.read(entry.rows(begin - start, end - start)))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def blocks(self, first: int, stop: int) -> Iterator[tuple[int, int]]:
        """Rows from `first` to `stop` in blocks that fit into memory: (first, stop) of each."""
        size = max(1, BLOCK_VALUES // self.width)
        for start in range(first, stop, size):
            yield start, min(start + size, stop)


def weight_of(target: Target, shape: tuple[int, ...]) -> Weight:
    """The matrix of a parameter of the model, without its update.

    Raises:
        ModelError: If its tensors are not runs of its rows.
    """
    if target.convert is None:
        return Weight(target.name, shape, ((0, target.sources[0]),))
    size = len(target.sources) // target.num_parts
    run = target.sources[:size]
    starts = _starts_of_run(target.convert, [source.shape for source in run])
    if starts is None or any(source.shape[-1] != shape[-1] for source in run):
        raise ModelError(
            f"the tensors that make {target.name} cannot be written back one by one",
            fix="save the model once with transformers, which stacks its experts",
        )
    num_rows = sum(source.shape[0] for source in run)
    placed = [
        (at // size * num_rows + starts[at % size], source)
        for at, source in enumerate(target.sources)
    ]
    return Weight(target.name, shape, tuple(sorted(placed, key=lambda place: place[0])))


def _starts_of_run(convert: Any, shapes: Sequence[tuple[int, ...]]) -> list[int] | None:
    """The first row of each source in what `convert` makes of them; None if they are no runs."""
    if any(len(shape) != 2 for shape in shapes):
        return None
    marks = [torch.full((shape[0], 1), number) for number, shape in enumerate(shapes)]
    made = convert([partial(_same, mark) for mark in marks]).flatten().tolist()
    starts = [made.index(number) if number in made else 0 for number in range(len(shapes))]
    expected = sorted(zip(starts, range(len(shapes)), strict=True))
    rows = [number for _, number in expected for _ in range(shapes[number][0])]
    return starts if made == rows else None


def _same(value: Tensor) -> Tensor:
    return value


@dataclass(frozen=True)
class Base:
    """The values that an update is added to, in float32, some rows at a time.

    Args:
        dtype: The type in which the model computes with them.
        quantized: The weight in 4 bits; None reads what the disk holds.
    """

    weight: Weight
    dtype: torch.dtype
    quantized: Quantized | None = None

    def rows(self, first: int, stop: int) -> Tensor:
        """Rows of the base, rounded to `dtype`, (stop - first, width) in float32."""
        if self.quantized is None:
            return self.weight.read(first, stop).to(self.dtype).float()
        width = self.weight.width
        flat = dequantize(
            self.quantized,
            dtype=self.dtype,
            start=first * width,
            count=(stop - first) * width,
        )
        return flat.view(-1, width).float()

    def merged(self, first: int, stop: int) -> Tensor:
        """The same rows with the update."""
        rows, update = self.rows(first, stop), self.weight.update
        return rows if update is None else rows.add_(update.rows(first, stop))


def quantize_rows(
    weight: Weight, read: Callable[[int, int], Tensor], settings: Mapping[str, Any]
) -> Quantized:
    """The matrix in 4 bits, of rows that `read(first, stop)` gives."""
    num_parts = _num_parts(weight, int(settings["block_size"]))
    size = weight.num_rows // num_parts
    parts = [partial(read, at, at + size) for at in range(0, weight.num_rows, size)]
    return quantize_parts(parts, (weight.num_rows, weight.width), **settings)


def _num_parts(weight: Weight, block_size: int) -> int:
    """Equal parts that are small and end at blocks; one where there are none such."""
    least = -(-weight.num_rows * weight.width // BLOCK_VALUES)
    for number in range(least, weight.num_rows + 1):
        size = weight.num_rows // number
        if size * number == weight.num_rows and size * weight.width % block_size == 0:
            return number
    return 1
