"""Weights of a base with an adapter folded in, written tensor by tensor.

    16bit         the weights on disk, plus the update, rounded once to 16 (or 32) bits
    dequantized   the 4-bit weights that a QLoRA adapter was trained on, plus the update, likewise
    4bit          the weights on disk, plus the update, in 4 bits
    4bit-search   the same with the block scales of least squared error

A base that is on disk in 4 bits counts as its dequantised weights. At no time is more in memory
than a block of rows of one weight, and of a weight in 4 bits its codes. Experts keep 16 bits in
every target, as bitsandbytes leaves them.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from nibble.adapter.format import read_factors
from nibble.adapter.rounding import Rounding
from nibble.adapter.stored4bit import config_4bit, specs_4bit, tensors_4bit
from nibble.adapter.updates import read_updates, with_experts
from nibble.adapter.weights import Base, Weight, quantize_rows, weight_of
from nibble.disk import disk_errors, write_file
from nibble.errors import UsageError
from nibble.kernels.nf4 import Quantized, dequantize
from nibble.model.adapt import linear_layers
from nibble.model.files import CONFIG_FILE, INDEX_FILE, SINGLE_FILE, read_config, read_index
from nibble.model.load import build_storage
from nibble.model.names import match_names
from nibble.model.place import Placer
from nibble.model.prequantized import check_quantization, read_quantized, split_quantized
from nibble.model.skeleton import build_config, build_skeleton
from nibble.model.tensors import Spec, TensorReader, tensor_file

TARGETS = ("16bit", "dequantized", "4bit", "4bit-search")
LARGEST_SHARD_BYTES = 4 << 30


@dataclass(frozen=True)
class MergeBase:
    """A base on disk and the adapter that is folded into it, before any value is read.

    Args:
        values: config.json of the base.
        weights: Every parameter, with its update.
        dense_linears: The linear layers that QLoRA does not keep in 4 bits.
    """

    values: dict[str, Any]
    weights: list[Weight]
    dense_linears: list[str]

    @property
    def is_stored_in_4bit(self) -> bool:
        """Whether the disk holds 4 bits only."""
        return any(weight.stored for weight in self.weights)

    def targets(self, trained_on: str) -> list[str]:
        """What the adapter can be merged onto, that which it was trained on first.

        Args:
            trained_on: The storage of the base in training, as in `load_base`.
        """
        if not any(weight.is_low_bit for weight in self.weights):
            return ["16bit"]
        if self.is_stored_in_4bit:
            return ["dequantized", "4bit", "4bit-search"]
        is_low = trained_on in ("nf4", "fp4")
        return ["dequantized", "16bit", *TARGETS[2:]] if is_low else ["16bit", *TARGETS[2:]]


def open_merge(folder: Path, adapter: Path) -> MergeBase:
    """Match a base and an adapter; reads names, shapes and the factors.

    Raises:
        ModelError, AdapterError: If one is broken, or they do not belong together.
    """
    values = read_config(folder)
    check_quantization(values)
    entries, quantized = split_quantized(read_index(folder))
    model = build_skeleton(build_config(values), torch.bfloat16)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    targets = match_names(model, entries, folder)
    storage = build_storage("nf4", torch.bfloat16, None, trainable=False)
    placer = Placer(model, storage, torch.device("cpu"))
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    # A Conv1D is stored the other way round, and in 4 bits the order of the values decides.
    is_known = not any(isinstance(layer, Conv1D) for layer in linears.values())
    low_bit = {t.name for t in targets if is_known and not placer.needs_copy(t.name)}
    dense = [name for name in linears if f"{name}.weight" not in low_bit]
    stored = read_factors(adapter, linear_layers(with_experts(model)))
    updates = read_updates(model, stored)
    weights = [
        replace(
            weight_of(target, shapes[target.name]),
            update=updates.get(target.name),
            is_low_bit=target.name in low_bit,
            stored=quantized.get(target.sources[0].name),
        )
        for target in targets
    ]
    return MergeBase(values, weights, dense)


def write_weights(base: MergeBase, out: Path, onto: str, options: Mapping[str, Any]) -> Rounding:
    """Write config.json and the merged weights into an empty folder.

    Args:
        onto: One of `base.targets`.
        options: How the base was kept in training: `storage`, `dtype`, `quant` of `load_base`.

    Raises:
        UsageError: If the target is unknown, or of no use for this base.
        DiskError: If a file cannot be written.
    """
    known = base.targets(options["storage"])
    if onto not in known:
        raise UsageError(
            f"this adapter cannot be merged onto {onto!r}", fix=f"use one of {', '.join(known)}"
        )
    plan = _Plan(onto, options["dtype"], _settings(base, onto, options))
    rounding = Rounding()
    with disk_errors(f"cannot write the merged model {out}"):
        shards = _shards(plan, base.weights)
        names = [f"model-{n + 1:05}-of-{len(shards):05}.safetensors" for n in range(len(shards))]
        names = names if len(shards) > 1 else [SINGLE_FILE]
        for name, shard in zip(names, shards, strict=True):
            rounding += _write_shard(plan, out / name, shard)
        if len(shards) > 1:
            write_file(out / INDEX_FILE, [_index(plan, dict(zip(names, shards, strict=True)))])
        write_file(out / CONFIG_FILE, [to_json(_config(plan, base))])
    return rounding


def to_json(values: Mapping[str, Any]) -> bytes:
    """A JSON file for people."""
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()


@dataclass(frozen=True)
class _Plan:
    """What is written: `settings` are the arguments of `quantize`."""

    onto: str
    dtype: torch.dtype
    settings: dict[str, Any]

    def is_written_in_4bit(self, weight: Weight) -> bool:
        is_matrix = len(weight.sources) == 1 and len(weight.shape) == 2
        return self.onto.startswith("4bit") and weight.is_low_bit and is_matrix

    def specs(self, weight: Weight) -> dict[str, Spec]:
        """The tensors on disk that a weight becomes."""
        if self.is_written_in_4bit(weight):
            return specs_4bit(weight.sources[0][1].name, weight.shape, self.settings)
        if weight.stored:
            return {weight.sources[0][1].name: Spec(self.dtype, weight.shape)}
        return {
            e.name: Spec(self.dtype if e.dtype.is_floating_point else e.dtype, e.shape)
            for _, e in weight.sources
        }


def _settings(base: MergeBase, onto: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `quantize`: those of training, or of a checkpoint in 4 bits."""
    stored = next((weight for weight in base.weights if weight.stored), None)
    if stored is not None:
        q = _read_stored(stored)
        double = q.nested_absmax is not None
        found = {"type": q.type, "block_size": q.block_size, "double": double, "search": False}
    else:
        is_low = options["storage"] in ("nf4", "fp4")
        asked = build_storage(
            options["storage"] if is_low else "nf4",
            torch.bfloat16,
            options["quant"] if is_low else None,
            trainable=False,
        )
        found = dict(asked.quant or {})
    return found if onto == "dequantized" else {**found, "search": onto == "4bit-search"}


def _read_stored(weight: Weight) -> Quantized:
    assert weight.stored is not None, "the disk holds it in 4 bits"
    return read_quantized(weight.sources[0][1], dict(weight.stored), TensorReader([]))


def _shards(plan: _Plan, weights: Iterable[Weight]) -> list[list[Weight]]:
    """The weights in files of at most 4 GiB, or of one weight."""
    shards: list[list[Weight]] = [[]]
    size = 0
    for weight in weights:
        num_bytes = sum(spec.num_bytes for spec in plan.specs(weight).values())
        if shards[-1] and size + num_bytes > LARGEST_SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(weight)
        size += num_bytes
    return shards


def _write_shard(plan: _Plan, path: Path, weights: list[Weight]) -> Rounding:
    specs = {n: spec for weight in weights for n, spec in plan.specs(weight).items()}
    rounding = Rounding()
    with tensor_file(path, specs, {"format": "pt"}) as write:
        for weight in weights:
            if plan.is_written_in_4bit(weight):
                _write_4bit(plan, weight, write, rounding)
            else:
                _write_dense(plan, weight, write, rounding)
    return rounding


def _base_of(plan: _Plan, weight: Weight) -> Base:
    """The values that the update of a weight is added to."""
    if weight.stored:
        return Base(weight, plan.dtype, _read_stored(weight))
    if plan.onto == "dequantized" and weight.is_low_bit:
        return Base(weight, plan.dtype, quantize_rows(weight, weight.read, plan.settings))
    return Base(weight, plan.dtype)


def _write_dense(plan: _Plan, weight: Weight, write: Any, rounding: Rounding) -> None:
    base = _base_of(plan, weight)
    for number, (_, entry) in enumerate(weight.sources):
        first, stop = weight.rows_of(number)
        is_changed = weight.update is not None or base.quantized is not None
        blocks = weight.blocks(first, stop)
        if is_changed:
            write(entry.name, _merged_blocks(plan, base, blocks, rounding))
        else:
            write(entry.name, (_cast(weight.read(*block), plan.dtype) for block in blocks))


def _cast(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values.to(dtype) if values.is_floating_point() else values


def _merged_blocks(
    plan: _Plan, base: Base, blocks: Iterable[tuple[int, int]], rounding: Rounding
) -> Iterator[Tensor]:
    for block in blocks:
        rows = base.rows(*block)
        if base.weight.update is None:
            yield rows.to(plan.dtype)
            continue
        update = base.weight.update.rows(*block)
        written = (rows + update).to(plan.dtype)
        rounding.add(written.float(), rows, update)
        rounding.add_dense_step(written)
        yield written


def _write_4bit(plan: _Plan, weight: Weight, write: Any, rounding: Rounding) -> None:
    base = _base_of(plan, weight)
    if weight.update is None and base.quantized is not None:
        q = base.quantized
    else:
        # Not rounded to the type of the products on the way, unless the base has that type.
        q = quantize_rows(weight, base.merged, plan.settings)
    name = weight.sources[0][1].name
    for key, tensor in tensors_4bit(name, q, plan.dtype).items():
        write(key, [tensor])
    if weight.update is None:
        return
    rounding.add_quantized_step(q)
    for first, stop in weight.blocks(0, weight.num_rows):
        start, count = first * weight.width, (stop - first) * weight.width
        written = dequantize(q, dtype=torch.float32, start=start, count=count)
        update = weight.update.rows(first, stop)
        rounding.add(written.view(update.shape), base.rows(first, stop), update)


def _index(plan: _Plan, shards: Mapping[str, list[Weight]]) -> bytes:
    specs = {
        name: (file, spec)
        for file, weights in shards.items()
        for weight in weights
        for name, spec in plan.specs(weight).items()
    }
    total = sum(spec.num_bytes for _, spec in specs.values())
    places = {name: file for name, (file, _) in sorted(specs.items())}
    return to_json({"metadata": {"total_size": total}, "weight_map": places})


def _config(plan: _Plan, base: MergeBase) -> dict[str, Any]:
    dropped = ("quantization_config", "torch_dtype")
    values = {key: value for key, value in base.values.items() if key not in dropped}
    values["dtype"] = str(plan.dtype).removeprefix("torch.")
    if plan.onto.startswith("4bit"):
        values["quantization_config"] = config_4bit(plan.settings, plan.dtype, base.dense_linears)
    return values
