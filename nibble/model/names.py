"""Which tensors on disk make which parameter of the model.

Mostly the names agree. Where they do not, transformers' own conversion mapping says what to do:

    model.layers.0.block_sparse_moe.experts.0.w1.weight (F, D) \
    model.layers.0.block_sparse_moe.experts.0.w3.weight (F, D)  > experts.gate_up_proj (E, 2F, D)
    model.layers.0.block_sparse_moe.experts.1.w1.weight (F, D) /
"""

import copy
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from nibble.errors import ModelError
from nibble.model.tensors import Entry

# Tables that old checkpoints carry and that transformers computes.
_COMPUTED = re.compile(r"rotary_emb\.inv_freq$|\.attention\.(bias|masked_bias)$|\.attn\.bias$")
_MOST_LISTED = 5
_FIX = "download the model again; config.json and weights must be of one model"


Convert = Callable[[Sequence[Callable[[], Tensor]]], Tensor]


@dataclass(frozen=True)
class Target:
    """A parameter or buffer of the model and the tensors on disk that make it.

    Args:
        name: Its name in the model.
        sources: The tensors, in the order in which `convert` takes them.
        convert: Makes the parameter out of functions that read the sources; None takes the only
            source as it is.
        num_parts: Equal runs of `sources`, of each of which `convert` makes one slice of the first
            dimension (an expert).
    """

    name: str
    sources: tuple[Entry, ...]
    convert: Convert | None = None
    num_parts: int = 1

    def parts(self, read: Callable[[Entry], Tensor]) -> list[Callable[[], Tensor]]:
        """Functions that make the slices in order, reading their sources when they are called."""
        readers = [partial(read, source) for source in self.sources]
        if self.convert is None:
            return readers
        size = len(readers) // self.num_parts
        runs = [readers[at : at + size] for at in range(0, len(readers), size)]
        return [partial(self.convert, run) for run in runs]


def match_names(model: PreTrainedModel, entries: Mapping[str, Entry], folder: Path) -> list[Target]:
    """Every parameter and persistent buffer of `model` with its sources, ties excepted.

    Raises:
        ModelError: If a tensor is missing, or the checkpoint holds one the model has no use for.
    """
    expected = dict(model.state_dict())
    mapping = get_model_conversion_mapping(model)
    renamings = [step for step in mapping if isinstance(step, WeightRenaming)]
    converters = [step for step in mapping if isinstance(step, WeightConverter)]
    jobs: dict[str, list[tuple[str, str | None]]] = {}
    for key in entries:
        name, pattern = rename_source_key(
            key, renamings, converters, model.base_model_prefix, expected
        )
        jobs.setdefault(name, []).append((key, pattern))
    ties = tied_names(model)
    ignored = [re.compile(p) for p in model._keys_to_ignore_on_load_unexpected or ()]
    unexpected = [
        sources[0][0]
        for name, sources in jobs.items()
        if name not in expected and not any(p.search(name) for p in (_COMPUTED, *ignored))
    ]
    _stop_if(unexpected, f"{folder} holds tensors that {model.config.model_type} does not have")
    missing = [name for name in expected if name not in jobs and name not in ties]
    _stop_if(missing, f"{folder} lacks tensors of {model.config.model_type}")
    return [
        _target(model, name, sources, converters, entries)
        for name, sources in sorted(jobs.items())
        if name in expected
    ]


def tied_names(model: PreTrainedModel) -> dict[str, str]:
    """Parameters that share another's memory: name -> name of the one that is stored."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def _target(
    model: PreTrainedModel,
    name: str,
    sources: list[tuple[str, str | None]],
    converters: list[WeightConverter],
    entries: Mapping[str, Entry],
) -> Target:
    sources = sorted(sources, key=lambda source: dot_natural_key(source[0]))
    found = tuple(entries[key] for key, _ in sources)
    pattern = sources[0][1]
    if pattern is None:
        if len(found) > 1:
            keys = " and ".join(entry.name for entry in found)
            raise ModelError(f"{found[0].path}: {keys} are the same weight", fix=_FIX)
        return Target(name, found)
    counts = Counter(source_pattern for _, source_pattern in sources)
    if len(set(counts.values())) > 1:
        raise ModelError(
            f"the checkpoint lacks some of the tensors that make {name}: it has "
            f"{', '.join(f'{count} of {p}' for p, count in counts.items())}",
            fix=_FIX,
        )
    converter = next(step for step in converters if pattern in step.source_patterns)

    def convert(readers: Sequence[Callable[[], Tensor]]) -> Tensor:
        step: Any = copy.deepcopy(converter)
        # A run of sources that makes one slice has the patterns of any other run.
        for (key, source_pattern), read in zip(sources, readers, strict=False):
            step.add_tensor(name, key, source_pattern, read)
        made = step.convert(name, model=model, config=model.config)
        value = made[name] if name in made else next(iter(made.values()))
        return value[0] if isinstance(value, list) else value

    return Target(name, found, convert, _num_slices(sources))


def _num_slices(sources: Sequence[tuple[str, str | None]]) -> int:
    """How many runs of the sorted sources hold each pattern once: the experts of a layer."""
    patterns = [pattern for _, pattern in sources]
    size = len(set(patterns))
    is_regular = all(
        set(patterns[at : at + size]) == set(patterns) for at in range(0, len(patterns), size)
    )
    has_numbers = all("*" in str(pattern) for pattern in patterns)
    return len(patterns) // size if is_regular and has_numbers else 1


def _stop_if(names: list[str], what: str) -> None:
    if names:
        rest = f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
        raise ModelError(
            f"{what}: {', '.join(sorted(names)[:_MOST_LISTED])}{rest}",
            fix=_FIX,
        )
