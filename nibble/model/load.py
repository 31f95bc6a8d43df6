"""Load a base: stream a checkpoint, tensor by tensor, into the storage that is asked for.

    files        folder or hub id, config.json, which file holds which tensor
    skeleton     transformers' modules without weights
    names        tensor on disk -> parameter of the model, experts stacked
    placing      each tensor is checked, quantised or converted, placed, and forgotten
    tokenizer    from the same folder

At no time is more than one tensor of the checkpoint in memory beside the result; of experts that
are stored one by one, the tensors of one expert.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from nibble.errors import ModelError, UsageError
from nibble.kernels.nf4 import BLOCK_SIZE
from nibble.model.families import family_of
from nibble.model.files import find_model, read_config, read_index
from nibble.model.folder import plain_values, read_json
from nibble.model.ledger import resident_bytes
from nibble.model.names import match_names, tied_names
from nibble.model.place import Placer, Storage, check_ties
from nibble.model.prequantized import check_quantization, read_quantized, split_quantized
from nibble.model.selfcheck import check_model
from nibble.model.skeleton import build_config, build_skeleton
from nibble.model.tensors import Entry, TensorReader
from nibble.model.tokenizer import load_tokenizer

_log = logging.getLogger("nibble")
STORAGES = ("bf16", "float32", "nf4", "fp4")


def load_base(
    name: str,
    storage: str = "bf16",
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    quant: Mapping[str, Any] | None = None,
    trainable: bool = False,
    host_embeddings: bool = False,
    device: torch.device | str | None = None,
) -> tuple[PreTrainedModel, Any]:
    """A frozen causal language model and its tokenizer.

        load_base("folder")                       16-bit weights
        load_base("folder", storage="nf4")        linear layers and experts in 4 bits
        load_base("folder", storage="float32", trainable=True)    for training every weight

    A checkpoint that bitsandbytes stored in 4 bits keeps its own codes, bit for bit, whatever
    `quant` asks for; asked for in 16 bits it is refused.

    Args:
        name: A folder in the transformers layout, or a hub id.
        storage: "bf16", "float32", "nf4" or "fp4". Embeddings, head, norms, biases and routers
            are never stored in 4 bits.
        revision: Branch, tag or commit of a hub id.
        dtype: Type of all that is not in 4 bits, and of the products; "float32" storage sets it.
        quant: How to quantise: block_size (64), double (True), search (False).
        trainable: Leave transformers' own layers in place, with gradients.
        host_embeddings: Look token embeddings up in host memory where the device is another.
        device: Where the weights go; None is the CPU.

    Raises:
        ModelError: If the model is incomplete, broken or of an unknown kind.
        UnavailableError: If a hub id is neither cached nor reachable.
        UsageError: If the arguments do not go together.
    """
    stored = build_storage(
        storage, dtype, quant, trainable=trainable, host_embeddings=host_embeddings
    )
    folder = find_model(str(name), revision)
    values = read_config(folder)
    if check_quantization(values):
        stored = _storage_of_checkpoint(stored, storage, values)
    entries = read_index(folder)
    _check_depth(values, entries)
    config = build_config(values)
    tokenizer = load_tokenizer(folder, config)
    model = build_skeleton(config, stored.dtype)
    _load_generation_config(model, folder)
    _load_weights(model, folder, entries, stored, torch.device(device or "cpu"))
    model.name_or_path = str(name)
    model.base_options = _options_of(stored, storage)  # type: ignore[assignment]
    model.eval()
    if not family_of(config).is_first_class:
        _check_unlisted(model, stored)
    return model, tokenizer


def _options_of(stored: Storage, storage: str) -> dict[str, Any]:
    """The arguments of this module's `load_base` that gave these weights, for a written adapter."""
    quant = {} if stored.quant is None else {k: v for k, v in stored.quant.items() if k != "type"}
    return {"storage": storage, "dtype": stored.dtype, "quant": quant}


def build_storage(
    storage: str,
    dtype: torch.dtype,
    quant: Mapping[str, Any] | None,
    *,
    trainable: bool,
    host_embeddings: bool = False,
) -> Storage:
    """How weights are kept; the arguments are those of `load_base`.

    Raises:
        UsageError: If they do not go together.
    """
    if storage not in STORAGES:
        raise UsageError(f"unknown storage {storage!r}", fix=f"use one of {', '.join(STORAGES)}")
    if storage == "float32":
        dtype = torch.float32
    if trainable and host_embeddings:
        raise UsageError(
            "embeddings that are trained cannot stay in host memory",
            fix="use model.embeddings=device, or method=lora or qlora",
        )
    if storage not in ("nf4", "fp4"):
        return Storage(dtype, trainable, host_embeddings=host_embeddings)
    if trainable:
        raise UsageError(
            f"weights in {storage} cannot be trained", fix='use storage="bf16" or "float32"'
        )
    settings = {"block_size": BLOCK_SIZE, "double": True, "search": False, "type": storage}
    unknown = sorted(set(quant or {}) - set(settings))
    if unknown:
        raise UsageError(f"quant: unknown setting {unknown[0]!r}", fix=f"known: {list(settings)}")
    settings = {**settings, **(quant or {}), "type": storage}
    return Storage(dtype, quant=settings, host_embeddings=host_embeddings)


def _storage_of_checkpoint(asked: Storage, storage: str, config: Mapping[str, Any]) -> Storage:
    """What a checkpoint in 4 bits is loaded as: its codes as they are, the rest as asked.

    bitsandbytes leaves experts in 16 bits: they are quantised here. What the checkpoint was told
    to skip stays as it is.
    """
    if asked.quant is None:
        raise UsageError(
            f'the checkpoint is stored in 4 bits and cannot be loaded with storage="{storage}"',
            fix='use method qlora (storage="nf4"), or the 16-bit checkpoint',
        )
    skipped = config["quantization_config"].get("llm_int8_skip_modules")
    kept = tuple(map(str, skipped)) if isinstance(skipped, list) else ()
    return replace(asked, kept=kept)


def _check_depth(config: Mapping[str, Any], entries: Mapping[str, Entry]) -> None:
    """A layer has a tensor at least: a number of layers beyond that would only fill memory."""
    for key in ("num_hidden_layers", "num_layers", "n_layer", "n_layers"):
        count = config.get(key)
        if isinstance(count, int) and count > len(entries):
            raise ModelError(
                f"config.json says {key}: {count}, but the checkpoint has {len(entries)} tensors",
                fix="config.json and weights must be of one model",
            )


def _load_weights(
    model: PreTrainedModel,
    folder: Path,
    stored: Mapping[str, Entry],
    storage: Storage,
    device: torch.device,
) -> None:
    entries, quantized = split_quantized(stored)
    reader, placer = TensorReader(entries.values()), Placer(model, storage, device)
    ties, late = tied_names(model), []
    for target in match_names(model, entries, folder):
        source = target.sources[0]
        if target.name in ties:
            late.append(target)
        elif source.name in quantized:
            q = read_quantized(source, quantized[source.name], reader)
            placer.place_quantized(target.name, q)
        elif target.convert is not None:
            placer.place_parts(target.name, target.parts(reader.read))
        elif placer.needs_copy(target.name):
            placer.place(target.name, reader.read(source))
        else:
            placer.place(target.name, reader.borrow(source))
    placer.finish()
    for target in late:
        check_ties(model, target.name, reader.borrow(target.sources[0]))


def _check_unlisted(model: PreTrainedModel, storage: Storage) -> None:
    """Check an architecture that is not listed, and say what it keeps out of 4 bits."""
    check_model(model)
    kept = [kind for kind in resident_bytes(model) if kind.endswith((" linears", " experts"))]
    _log.warning(
        "%s is not among the tested architectures; it passed the check of packing and logits%s",
        model.config.model_type,
        f"; not in 4 bits: {', '.join(kept)}" if storage.quant and kept else "",
    )


def _load_generation_config(model: PreTrainedModel, folder: Path) -> None:
    path = folder / "generation_config.json"
    if path.is_file():
        try:
            model.generation_config = GenerationConfig.from_dict(plain_values(read_json(path)))
        except (ValueError, TypeError, AttributeError) as error:
            raise ModelError(
                f"{path} is broken: {error}", fix="download the file again, or remove it"
            ) from None
