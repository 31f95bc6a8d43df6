"""Follows every byte of a computation: when it is allocated, what it is for, when it is given back.

Works on real tensors and on fake ones, which have shapes and no values. A view costs nothing; a
storage counts from the first tensor that shows it until its last tensor is gone.
"""

import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nibble.kernels.target import is_host_allocation

SAVED = "saved activations"
WORKING = "layer working set"
HEAD = "logits and loss"

# What fake tensors ask for by far the most often; they know it themselves.
_DEVICE = torch.ops.prim.device.default
# Experts that a simulation goes through one by one.
MOST_EXPERTS = 8

# Operations that move no bytes, whatever their inputs are.
_FREE = frozenset(
    {"view", "_unsafe_view", "detach", "t", "transpose", "permute", "slice", "select", "expand"}
    | {"unsqueeze", "squeeze", "as_strided", "alias", "empty", "new_empty", "empty_like", "split"}
    | {"unbind", "split_with_sizes", "_local_scalar_dense", "unfold", "lift_fresh"}
)
# Matrix products and the places of their two factors.
_PRODUCTS = {
    "mm": (0, 1),
    "bmm": (0, 1),
    "_grouped_mm": (0, 1),
    "addmm": (1, 2),
    "addmm_": (1, 2),
    "baddbmm": (1, 2),
}


class Operation(NamedTuple):
    """What one operation asks of a device.

    Args:
        kind: "product", "attention", "decode" (a stored weight made dense) or "other".
        flops: Floating-point operations of products and attention.
        bytes: Read and written.
    """

    kind: str
    flops: int
    bytes: int


@dataclass(frozen=True)
class Peak:
    """The most bytes that were alive at once in one phase, and what they were for."""

    bytes: int = 0
    parts: dict[str, int] = field(default_factory=dict)

    def plus(self, part: str, num_bytes: int) -> "Peak":
        """The same with one part more."""
        return Peak(self.bytes + num_bytes, {**self.parts, part: num_bytes})


class MemoryTracker(TorchDispatchMode):
    """Within the block, every storage that an operation gives is followed.

    Attributes:
        live: Bytes alive now, by label; host memory of a CUDA run is not among them.
        peaks: The peak of each phase that was begun.
        work: How often each phase asked for each operation.

    Args:
        granularity: Every storage is rounded up to a multiple of so many bytes.
        intercept: Asked before every operation; what it gives instead of None is the result.
    """

    def __init__(
        self,
        *,
        granularity: int = 1,
        intercept: Callable[[Any, tuple, dict], Any] = lambda func, args, kwargs: None,
    ) -> None:
        super().__init__()
        self.granularity = granularity
        self.intercept = intercept
        self.live: dict[str, int] = {}
        self.host_bytes = 0
        self.host_peak = 0
        self.peaks: dict[str, Peak] = {}
        self.work: defaultdict[str, Counter[Operation]] = defaultdict(Counter)
        self.label = WORKING
        self._total = 0
        self._phase = ""
        self._known: dict[int, tuple[str, int]] = {}
        self._fresh: list[int] = []

    @property
    def total(self) -> int:
        """Device bytes alive now."""
        return self._total

    def begin(self, phase: str, label: str = WORKING) -> None:
        """From here on, count towards `phase`, and label what is allocated."""
        self._phase, self.label = phase, label
        self._note_peak()

    def settle(self, label: str) -> None:
        """Give `label` to all that was allocated since the last call and is still alive."""
        for key in self._fresh:
            self._relabel(key, label)
        self._fresh.clear()

    def name(self, tensors: Iterable[Tensor], label: str) -> None:
        """Give `label` to the storages of these tensors; unknown ones are counted from now on."""
        for tensor in tensors:
            self._see(tensor)
            self._relabel(tensor.untyped_storage()._cdata, label)

    def count_kernel(self, kind: str, flops: int, num_bytes: int, num_parts: int) -> None:
        """Count a kernel that works on one of so many parts of its input.

        Of many experts only some are gone through; each of them stands for several.
        """
        times = max(1, num_parts // MOST_EXPERTS)
        self.work[self._phase][Operation(kind, flops, num_bytes)] += times

    def count_scratch(self, num_bytes: int) -> None:
        """Count memory that lives only within the operation that runs now."""
        self._add(WORKING, num_bytes)
        self._note_peak()
        self._add(WORKING, -num_bytes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _DEVICE:
            return args[0].fake_device
        out = self.intercept(func, args, kwargs)
        if out is None:
            out = func(*args, **kwargs)
        if isinstance(out, Tensor):
            self._see(out)
        elif isinstance(out, list | tuple):
            for item in out:
                if isinstance(item, Tensor):
                    self._see(item)
        self._count(func, args, out)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = -(-storage.nbytes() // self.granularity) * self.granularity
        label = "host" if is_host_allocation() else self.label
        self._known[key] = label, size
        self._add(label, size)
        self._fresh.append(key)
        weakref.finalize(storage, self._forget, key)
        self._note_peak()

    def _forget(self, key: int) -> None:
        label, size = self._known.pop(key)
        self._add(label, -size)

    def _add(self, label: str, size: int) -> None:
        if label == "host":
            self.host_bytes += size
            self.host_peak = max(self.host_peak, self.host_bytes)
            return
        self.live[label] = self.live.get(label, 0) + size
        self._total += size

    def _relabel(self, key: int, label: str) -> None:
        if key in self._known and self._known[key][0] not in (label, "host"):
            old, size = self._known[key]
            self._known[key] = label, size
            self._add(old, -size)
            self._add(label, size)

    def _note_peak(self) -> None:
        known = self.peaks.get(self._phase)
        if known is None or self._total > known.bytes:
            parts = {label: size for label, size in self.live.items() if size}
            self.peaks[self._phase] = Peak(self._total, parts)

    def _count(self, func: Any, args: Any, out: Any) -> None:
        name = func._schema.name.removeprefix("aten::")
        if name in _FREE:
            return
        tensors = list(_tensors_of((*args, out)))
        num_bytes = sum(t.numel() * t.itemsize for t in tensors)
        kind, flops = "other", 0
        if name in _PRODUCTS:
            left, right = (args[place] for place in _PRODUCTS[name])
            kind, flops = "product", 2 * left.numel() * right.shape[-1]
        elif "dot_product" in name:
            kind, flops = "attention", _attention_flops(name, tensors)
        self.work[self._phase][Operation(kind, flops, num_bytes)] += 1


def _tensors_of(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among some values and in lists among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from (item for item in value if isinstance(item, Tensor))


def _attention_flops(name: str, tensors: list[Tensor]) -> int:
    """Two products of (L, K) by (K, L), half of it for causal attention; five in backward."""
    is_backward = name.endswith("backward")
    query, key = tensors[1:3] if is_backward else tensors[:2]
    num_products = 5 if is_backward else 2
    return num_products * query.numel() * key.shape[2]
