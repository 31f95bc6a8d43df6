"""Many adapters over one base, loaded and unloaded while the base stays.

adapters = Adapters(model)
adapters.load("law", "runs/law/adapter")
with adapters.chosen("law"):
    ...                                   the whole model computes with it
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from nibble.adapter.format import PREFIX, StoredAdapter, read_factors
from nibble.errors import UsageError, did_you_mean
from nibble.model.adapt import frozen_linear, linear_layers
from nibble.model.experts import Experts
from nibble.model.families import head_of
from nibble.model.lora import LoRALinear, lora_scale
from nibble.model.many import Choice, ExpertUpdate, ManyExperts, ManyLinear, Slices, Update


class Adapters:
    """The adapters of a base, by name.

    Layers that no adapter updates stay as they are. Factors are kept in the type of the model's
    products.

    Args:
        model: A base, as `load_base` gives it.

    Raises:
        UsageError: If the model is adapted already.
    """

    def __init__(self, model: Any) -> None:
        if any(isinstance(m, LoRALinear | ManyLinear | ManyExperts) for m in model.modules()):
            raise UsageError("the model is adapted already", fix="load the base again")
        self._model = model
        self._layers = linear_layers(model)
        self._many: dict[str, ManyLinear | ManyExperts] = {}
        self._choice = Choice()
        self._layers_of: dict[str, tuple[str, ...]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The loaded adapters, in the order in which they were loaded."""
        return tuple(self._layers_of)

    def load(self, name: str, folder: str | Path) -> None:
        """Read an adapter folder; the model computes with it where it is chosen.

        Raises:
            AdapterError: If the folder is broken or does not fit the model; nothing is loaded.
            UsageError: If the name is taken.
        """
        if name in self._layers_of:
            raise UsageError(
                f"an adapter named {name!r} is loaded already",
                fix="unload it, or take another name",
            )
        stored = read_factors(folder, self._layers)
        for layer in stored.layers:
            self._many_of(layer).updates[name] = self._update(stored, layer)
        self._layers_of[name] = stored.layers

    def unload(self, name: str) -> None:
        """Forget an adapter.

        Raises:
            UsageError: If there is none of this name.
        """
        self.check(name)
        for layer in self._layers_of.pop(name):
            many = self._many[layer]
            del many.updates[name]
            if not many.updates:
                self._model.set_submodule(layer, self._many.pop(layer).base)

    def check(self, name: str) -> None:
        """Raise UsageError if there is no adapter of this name."""
        if name not in self._layers_of:
            known = ", ".join(self.names) or "none is loaded"
            close = did_you_mean(name, self.names)
            raise UsageError(f"no adapter is named {name!r} ({known})", fix=close)

    @contextmanager
    def chosen(self, name: str | None) -> Iterator[None]:
        """Within the block the whole model computes with this adapter; None is the base.

        Raises:
            UsageError: If there is none of this name.
        """
        if name is not None:
            self.check(name)
        with self._choice.use(() if name is None else ((name, slice(None)),)):
            yield

    def rows(self, slices: Slices) -> AbstractContextManager[None]:
        """Within the block these rows of the packed batch go through these adapters."""
        return self._choice.use(slices)

    def _many_of(self, layer: str) -> Any:
        """The layer in the form that takes updates."""
        if layer not in self._many:
            base = self._layers[layer]
            if isinstance(base, Experts):
                self._many[layer] = ManyExperts(base, self._choice)
            else:
                self._many[layer] = ManyLinear(frozen_linear(base), self._choice)
            self._many[layer].train(base.training)
            self._model.set_submodule(layer, self._many[layer])
        return self._many[layer]

    def _update(self, stored: StoredAdapter, layer: str) -> Any:
        base, key = self._layers[layer], f"{PREFIX}{layer}"
        config = stored.config
        scale = lora_scale(
            rank=config.rank, alpha=config.alpha, dropout=config.dropout, rslora=config.rslora
        )
        device, dtype = next(base.parameters()).device, head_of(self._model).weight.dtype

        def factor(key: str, part: str) -> Tensor:
            return stored.tensors[f"{key}.{part}.weight"].to(device, dtype)

        if isinstance(base, Experts):
            keys = f"{key}.base_layer", key
            return tuple(
                ExpertUpdate(factor(each, "lora_A"), factor(each, "lora_B"), scale) for each in keys
            )
        lora_A, lora_B = factor(key, "lora_A"), factor(key, "lora_B")
        return Update(lora_A.contiguous(), lora_B.T.contiguous(), scale)
