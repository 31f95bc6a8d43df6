"""Where the moments of the optimizer live: on the device, or in pages of host memory.

Both places keep one flat state for all groups and are walked in the same pages, in order; so a
paged optimizer computes the very same bits, and its checkpoints have the same tensors.

    device   [ 0 ][ 1 ]  resident pages             [ slot ][ slot ]
    host                 [ 2 ][ 3 ][ 4 ] ...          in ^    v out

While a page is computed in one slot, the next comes into the other. A walk visits every page
once, so it is best to keep the same first pages resident: evicting the least recently used page
would move all of them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nibble.kernels.target import host_empty
from nibble.model.recompute import SideCopies
from nibble.train.state8bit import BLOCK_SIZE, Part, Parts

# A page of some 2^20 values whatever the bits; page-locked memory is given out in powers of two.
PAGE_BYTES_PER_BIT = 1 << 18
NUM_SLOTS = 2


@dataclass(frozen=True)
class Page:
    """A range of the values of one group."""

    group: int
    values: slice

    @property
    def num_values(self) -> int:
        """Number of values."""
        return self.values.stop - self.values.start


def cut_pages(parts: Sequence[Part], sizes: Sequence[int], page_bytes: int) -> tuple[Page, ...]:
    """The pages of groups of so many values; only the last page of a group is shorter.

    Raises:
        ValueError: If not even one block of 256 values fits a page.
    """
    length = page_bytes // count_bytes(parts, BLOCK_SIZE) * BLOCK_SIZE
    if length == 0:
        raise ValueError(
            f"page_bytes is {page_bytes}, expected at least {count_bytes(parts, BLOCK_SIZE)}"
        )
    return tuple(
        Page(group, slice(start, min(start + length, size)))
        for group, size in enumerate(sizes)
        for start in range(0, size, length)
    )


def count_bytes(parts: Sequence[Part], num_values: int) -> int:
    """Bytes of the moments of so many values."""
    return sum(part.count(num_values) * part.dtype.itemsize for part in parts)


class ResidentMoments:
    """All moments on the device, each part of a group in one tensor."""

    def __init__(
        self, parts: Sequence[Part], sizes: Sequence[int], device: torch.device, *, page_bytes: int
    ) -> None:
        self._parts = parts
        self._pages = cut_pages(parts, sizes, page_bytes)
        self._tensors = [
            {p.name: torch.zeros(p.count(size), dtype=p.dtype, device=device) for p in parts}
            for size in sizes
        ]

    def walk(self) -> Iterator[tuple[Page, Parts]]:
        """Every page with its parts, to be changed in place."""
        for page in self._pages:
            tensors = self._tensors[page.group]
            yield page, {p.name: tensors[p.name][p.of(page.values)] for p in self._parts}

    def pieces(self) -> dict[str, list[Tensor]]:
        """Every part by name, in one piece; not copied."""
        return {
            f"group{group}.{name}": [tensor]
            for group, tensors in enumerate(self._tensors)
            for name, tensor in tensors.items()
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over parts by their names, whole."""
        for name, (tensor,) in self.pieces().items():
            tensor.copy_(tensors[name])


class PagedMoments:
    """The moments in host memory; at most `budget_bytes` of them are on the device.

    A page is one run of bytes, so it moves in one copy. If everything fits the budget nothing
    moves; else two slots take their share of the budget and the first pages the rest.

    Args:
        page_bytes: Size of a page and of a slot.
        budget_bytes: At least two pages; None is two pages, the smallest.

    Attributes:
        pages_in, pages_out, bytes_moved: Copies so far, to and from the device.

    Raises:
        ValueError: If the budget is below two pages.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        sizes: Sequence[int],
        device: torch.device,
        *,
        page_bytes: int,
        budget_bytes: int | None = None,
    ) -> None:
        least = NUM_SLOTS * page_bytes
        budget_bytes = least if budget_bytes is None else budget_bytes
        if budget_bytes < least:
            raise ValueError(
                f"budget_bytes is {budget_bytes}, expected at least {least}: two pages"
            )
        self._parts = parts
        self._sizes = sizes
        self._pages = cut_pages(parts, sizes, page_bytes)
        num_fitting = budget_bytes // page_bytes
        is_paged = len(self._pages) > num_fitting
        self._num_resident = num_fitting - NUM_SLOTS if is_paged else len(self._pages)
        self._slots = [
            torch.empty(page_bytes, dtype=torch.uint8, device=device)
            for _ in range(NUM_SLOTS if is_paged else 0)
        ]
        self._stored = [self._new_page(index, device) for index in range(len(self._pages))]
        self._copies = SideCopies(device)
        self.pages_in = 0
        self.pages_out = 0
        self.bytes_moved = 0

    @property
    def stall_seconds(self) -> float:
        """Time that the computation has stood still for pages."""
        return self._copies.stall_seconds

    @property
    def device_bytes(self) -> int:
        """Bytes on the device: resident pages and slots."""
        resident = self._stored[: self._num_resident]
        return sum(tensor.nbytes for tensor in (*resident, *self._slots))

    def walk(self) -> Iterator[tuple[Page, Parts]]:
        """Every page with its parts on the device, to be changed before the next is asked for."""
        first = self._num_resident
        arriving = self._fetch(first)
        for index in range(first):
            yield self._pages[index], self._parts_of(index, self._stored[index])
        for index in range(first, len(self._pages)):
            arrived, arriving = arriving, self._fetch(index + 1)
            self._copies.wait(arrived)
            yield self._pages[index], self._parts_of(index, self._slot(index))
            self._copies.copy(self._stored[index], self._slot(index))
            self.pages_out += 1
            self.bytes_moved += self._stored[index].nbytes

    def pieces(self) -> dict[str, list[Tensor]]:
        """Every part by name, a piece a page; not copied."""
        self._copies.synchronize()
        pieces: dict[str, list[Tensor]] = {}
        for index, page in enumerate(self._pages):
            for name, tensor in self._parts_of(index, self._stored[index]).items():
                pieces.setdefault(f"group{page.group}.{name}", []).append(tensor)
        return pieces

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over parts by their names, whole."""
        self._copies.synchronize()
        for index, page in enumerate(self._pages):
            stored = self._parts_of(index, self._stored[index])
            for part in self._parts:
                whole = tensors[f"group{page.group}.{part.name}"]
                stored[part.name].copy_(whole[part.of(page.values)])

    def _fetch(self, index: int) -> torch.cuda.Event | None:
        """Start to bring a page into its slot, which the page before the last has left."""
        if index >= len(self._pages):
            return None
        self.pages_in += 1
        self.bytes_moved += self._stored[index].nbytes
        return self._copies.copy(self._slot(index), self._stored[index])

    def _slot(self, index: int) -> Tensor:
        return self._slots[index % NUM_SLOTS][: self._stored[index].nbytes]

    def _new_page(self, index: int, device: torch.device) -> Tensor:
        num_bytes = count_bytes(self._parts, self._pages[index].num_values)
        if index < self._num_resident:
            return torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        return host_empty(num_bytes, dtype=torch.uint8).zero_()

    def _parts_of(self, index: int, page: Tensor) -> dict[str, Tensor]:
        """The parts that lie one after the other in the bytes of a page, wide types first."""
        found, start = {}, 0
        for part in self._parts:
            stop = start + count_bytes([part], self._pages[index].num_values)
            found[part.name] = page[start:stop].view(part.dtype)
            start = stop
        return found
