"""Layers that add the updates of several adapters, each to the rows that chose it.

rows of x      a a a | b b | - -        choice = (("a", 0:3), ("b", 3:5))
y = base(x)    + A   | + B |
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nibble.kernels.few_rows import add_update_
from nibble.model.experts import Experts

Slices = tuple[tuple[str, slice], ...]


class Choice:
    """Which rows of the packed batch that a model is given now go through which adapter.

    All layers of a model share one. Rows in no slice go through the base alone.
    """

    def __init__(self) -> None:
        self.slices: Slices = ()

    @contextmanager
    def use(self, slices: Slices) -> Iterator[None]:
        """Within the block these rows go through these adapters."""
        before, self.slices = self.slices, slices
        try:
            yield
        finally:
            self.slices = before


@dataclass(frozen=True, eq=False)
class Update:
    """A low-rank update of one weight: scale * x A^T B^T.

    Shapes:
        lora_A: (R, I). lora_B_RO: B^T, (R, O).
    """

    lora_A: Tensor
    lora_B_RO: Tensor
    scale: float


@dataclass(frozen=True, eq=False)
class ExpertUpdate:
    """Updates of one weight of all experts of a layer, as `ExpertWeight` keeps them."""

    lora_A: Tensor
    lora_B: Tensor
    scale: float


ExpertUpdates = tuple[ExpertUpdate, ExpertUpdate]


class ManyLinear(nn.Module):
    """A frozen linear layer and the updates of the adapters that have one for it.

        y[rows of adapter n] = base(x) + scale_n * x A_n^T B_n^T

    For inference: no gradient reaches the updates.

    Shapes:
        x: (..., I) -> y: (..., O).

    Attributes:
        updates: By adapter.
    """

    def __init__(self, base: nn.Module, choice: Choice) -> None:
        super().__init__()
        self.base, self.choice = base, choice
        self.updates: dict[str, Update] = {}

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        y = self.base(x)
        for name, rows in self.choice.slices:
            update = self.updates.get(name)
            if update is not None:
                x_TI, y_TO = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
                add_update_(y_TO[rows], x_TI[rows], update.lora_A, update.lora_B_RO, update.scale)
        return y


class ManyExperts(nn.Module):
    """The experts of a layer, whose updates are those of the adapter of each row.

    Rows of one adapter are one call of the experts.

    Attributes:
        updates: By adapter: of the gate-and-up weight and of the down weight.
    """

    def __init__(self, base: Experts, choice: Choice) -> None:
        super().__init__()
        self.base, self.choice = base, choice
        self.updates: dict[str, ExpertUpdates] = {}

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(T, D), chosen experts (T, k) and their weights (T, k) -> (T, D)."""
        outputs = []
        for updates, rows in self._parts(len(hidden_states)):
            with self._updated(updates):
                parts = (t[rows] for t in (hidden_states, top_k_index, top_k_weights))
                outputs.append(self.base(*parts))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _parts(self, num_rows: int) -> Iterator[tuple[ExpertUpdates | None, slice]]:
        """All rows in order, cut where the update changes."""
        done = 0
        for name, rows in self.choice.slices:
            start, stop, _ = rows.indices(num_rows)
            if name not in self.updates or start == stop:
                continue
            if done < start:
                yield None, slice(done, start)
            yield self.updates[name], rows
            done = stop
        if done < num_rows:
            yield None, slice(done, num_rows)

    @contextmanager
    def _updated(self, updates: ExpertUpdates | None) -> Iterator[None]:
        weights = self.base.gate_up_proj, self.base.down_proj
        for weight, update in zip(weights, updates or (None, None), strict=True):
            if update is not None:
                weight.use_factors(update.lora_A, update.lora_B, update.scale)
        try:
            yield
        finally:
            for weight in weights:
                weight.use_factors(None, None, 0.0)
