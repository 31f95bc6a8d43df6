"""Write GGUF files: the adapter alone, and a whole model tensor by tensor.

    adapter.gguf    general.type = adapter, adapter.lora.alpha, blk.0.attn_q.weight.lora_a (R, I)
                    and .lora_b (O, R), in float32
    model.gguf      architecture, tokenizer, chat template, blk.0.attn_q.weight (O, I) and so on

llama.cpp scales an update by alpha / R, so alpha is written such that this is the trained scale.
What goes where, and in which order of rows, is `layout`'s affair; tokens are `vocabulary`'s.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nibble.adapter.format import (
    PREFIX,
    StoredAdapter,
    read_factors,
)
from nibble.adapter.layout import (
    Place,
    architecture,
    extra_tensors,
    key_values,
    load_gguf,
    place,
    problem,
)
from nibble.adapter.updates import with_experts
from nibble.adapter.vocabulary import Vocabulary, read_vocabulary
from nibble.disk import disk_errors, remove, rename, sync_folder
from nibble.errors import ModelError, UnavailableError
from nibble.model.adapt import linear_layers
from nibble.model.files import read_config, read_index
from nibble.model.names import match_names
from nibble.model.skeleton import build_config, build_skeleton
from nibble.model.tensors import Entry, TensorReader, check_finite
from nibble.model.tokenizer import load_tokenizer

ADAPTER_FILE = "adapter.gguf"
MODEL_FILE = "model.gguf"
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_FILE_TYPES = {"f32": 0, "f16": 1, "bf16": 32}
_EXPERT = re.compile(r"(.*)\.(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)\.weight")
_EXPERT_PARTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
# Tables that old checkpoints carry, and that llama.cpp computes.
_COMPUTED = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")


@dataclass(frozen=True)
class _Job:
    """One tensor of a GGUF file: its name, its shape, and how its values are made."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def write_adapter_gguf(folder: Path, base: Mapping[str, Any], path: Path) -> int:
    """Write the factors of an adapter folder; returns the number of tensors.

    Args:
        base: The values of config.json of the model that the adapter belongs to.

    Raises:
        UnavailableError: If llama.cpp has no such layer, or this architecture is not known here.
        AdapterError: If the folder is broken, or does not fit the base.
    """
    config = _known_config(base)
    stored = read_factors(
        folder, linear_layers(with_experts(build_skeleton(config, torch.bfloat16)))
    )
    jobs = list(_adapter_jobs(config, stored))
    alpha = stored.config.alpha * (sqrt(stored.config.rank) if stored.config.rslora else 1.0)
    keys: dict[str, Any] = {
        "general.type": "adapter",
        "general.name": _title(path),
        "adapter.type": "lora",
        "adapter.lora.alpha": alpha,
    }
    _write(path, config, keys, jobs, "f32")
    return len(jobs)


def write_model_gguf(folder: Path, path: Path, *, dtype: str = "auto") -> Vocabulary:
    """Write a transformers folder as one file; returns what it says of the tokenizer.

    One tensor is in memory at a time; of experts, one weight of all experts of a layer.

    Args:
        dtype: Of matrices: auto (as stored), f32, f16 or bf16. Norms, biases and routers are f32.

    Raises:
        ModelError: If the folder is broken, or a value does not fit `dtype`.
        UnavailableError: If llama.cpp would not compute the same, as far as nibble can tell.
    """
    values = read_config(folder)
    config = _known_config(values)
    if values.get("quantization_config"):
        raise UnavailableError(
            f"{folder} is stored in 4 bits, which GGUF has no type for",
            fix="merge onto 16 bits: nibble merge --onto 16bit",
        )
    entries = read_index(folder)
    match_names(build_skeleton(config, torch.bfloat16), entries, folder)
    vocabulary = read_vocabulary(load_tokenizer(folder, config), config.vocab_size)
    chosen = _stored_dtype(entries) if dtype == "auto" else dtype
    keys = {
        "general.type": "model",
        # By this name llama.cpp lets special tokens take the white space after them.
        "general.name": "phi-3" if vocabulary.takes_space else _title(path),
        "general.file_type": _FILE_TYPES[chosen],
        "general.quantization_version": 2,
        **key_values(config),
        **_vocabulary_keys(vocabulary),
    }
    _write(path, config, keys, list(_model_jobs(config, entries)), chosen)
    return vocabulary


def _title(path: Path) -> str:
    """The name of the folder; llama.cpp treats tokens otherwise where it has one of some words."""
    name = path.absolute().parent.name
    return "model" if any(word in name.lower() for word in ("phi", "bert", "jina")) else name


def _known_config(values: Mapping[str, Any]) -> Any:
    config = build_config(dict(values))
    if why := problem(config):
        raise UnavailableError(why, fix="convert with llama.cpp's own scripts")
    return config


def _adapter_jobs(config: Any, stored: StoredAdapter) -> Iterator[_Job]:
    for key, lora_A in sorted(stored.tensors.items()):
        module = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        if not key.endswith(".lora_A.weight"):
            continue
        lora_B = stored.tensors[f"{PREFIX}{module}.lora_B.weight"]
        for where, down, up in _updates(config, module, lora_A, lora_B, stored.config.rank):
            for suffix, factor in (("lora_a", down), ("lora_b", up)):
                name = f"{where}.weight.{suffix}"
                yield _Job(name, tuple(factor.shape), lambda factor=factor: factor)


def _updates(
    config: Any, module: str, lora_A: Tensor, lora_B: Tensor, rank: int
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """llama.cpp's name of each update of a module, and its factors (R, I) and (O, R).

    Of experts the factors are (E, R, I) and (E, O, R); gate and up share the first.
    """
    if not module.removesuffix(".base_layer").endswith(".experts"):
        where = place(config, module)
        yield where.name, lora_A, lora_B if where.rows is None else lora_B[where.rows]
        return
    experts = module.removesuffix(".base_layer")
    num_experts = lora_A.shape[0] // rank
    down_ERI = lora_A.view(num_experts, rank, -1)
    up_EOR = lora_B.view(len(lora_B), rank, num_experts).permute(2, 0, 1)
    if module == experts:
        yield place(config, f"{experts}.down_proj").name, down_ERI, up_EOR
        return
    for part, half in zip(("gate_proj", "up_proj"), up_EOR.chunk(2, dim=1), strict=True):
        yield place(config, f"{experts}.{part}").name, down_ERI, half


def _model_jobs(config: Any, entries: Mapping[str, Entry]) -> Iterator[_Job]:
    reader = TensorReader([])
    for name, tensor in extra_tensors(config).items():
        yield _Job(name, tuple(tensor.shape), lambda tensor=tensor: tensor)
    experts: dict[str, list[tuple[int, Entry]]] = {}
    for name, entry in entries.items():
        is_tied = config.tie_word_embeddings and name == "lm_head.weight"
        if is_tied or name.endswith(_COMPUTED):
            continue
        if match := _EXPERT.fullmatch(name):
            part = _EXPERT_PARTS.get(match[3], match[3])
            group = experts.setdefault(f"{match[1]}.mlp.experts.{part}", [])
            group.append((int(match[2]), entry))
        elif name.endswith(".experts.gate_up_proj"):
            yield from _halves(config, name, entry, reader)
        elif name.endswith(".experts.down_proj"):
            yield _Job(f"{place(config, name).name}.weight", entry.shape, _read(reader, entry))
        else:
            yield _plain_job(config, entry, reader)
    for module, found in experts.items():
        ordered = [entry for _, entry in sorted(found, key=lambda one: one[0])]
        shape = (len(ordered), *ordered[0].shape)
        yield _Job(f"{place(config, module).name}.weight", shape, _stack(reader, ordered))


def _plain_job(config: Any, entry: Entry, reader: TensorReader) -> _Job:
    module, _, suffix = entry.name.rpartition(".")
    where = place(config, module)

    def make() -> Tensor:
        return _moved(_read(reader, entry)(), where)

    return _Job(f"{where.name}.{suffix}", entry.shape, make)


def _moved(tensor: Tensor, where: Place) -> Tensor:
    if where.rows is not None:
        tensor = tensor[where.rows]
    return tensor.float() + where.shift if where.shift else tensor


def _halves(config: Any, name: str, entry: Entry, reader: TensorReader) -> Iterator[_Job]:
    """The gate and the up weight of experts that are stored in one (E, 2F, D)."""
    experts = name.removesuffix(".gate_up_proj")
    num_experts, joined, width = entry.shape
    for number, part in enumerate(("gate_proj", "up_proj")):

        def make(number: int = number) -> Tensor:
            return _read(reader, entry)().chunk(2, dim=1)[number]

        target = place(config, f"{experts}.{part}").name
        yield _Job(f"{target}.weight", (num_experts, joined // 2, width), make)


def _read(reader: TensorReader, entry: Entry) -> Callable[[], Tensor]:
    def make() -> Tensor:
        tensor = reader.read(entry)
        check_finite(entry.name, tensor)
        return tensor

    return make


def _stack(reader: TensorReader, entries: Sequence[Entry]) -> Callable[[], Tensor]:
    return lambda: torch.stack([_read(reader, entry)() for entry in entries])


def _stored_dtype(entries: Mapping[str, Entry]) -> str:
    """The type of the largest tensor, among those that GGUF has."""
    largest = max(entries.values(), key=lambda entry: entry.num_bytes)
    names = {dtype: name for name, dtype in DTYPES.items()}
    return names.get(largest.dtype, "f32")


def _type_of(job: _Job, chosen: str) -> str:
    """Vectors, norms and routers are read in 32 bits only."""
    is_small = len(job.shape) < 2 or job.name.endswith(("_norm.weight", "ffn_gate_inp.weight"))
    return "f32" if is_small or not job.name.endswith((".weight", ".bias")) else chosen


def _vocabulary_keys(vocabulary: Vocabulary) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "model": vocabulary.model,
        "pre": vocabulary.pre,
        "tokens": vocabulary.tokens,
        "token_type": vocabulary.types,
        "add_bos_token": vocabulary.adds_bos,
        "add_eos_token": vocabulary.adds_eos,
        "add_space_prefix": vocabulary.adds_space,
        **{f"{name}_token_id": number for name, number in vocabulary.special.items()},
    }
    if vocabulary.model == "llama":
        keys["scores"] = vocabulary.scores
    else:
        keys["merges"] = vocabulary.merges
    named = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    return {**named, "tokenizer.chat_template": vocabulary.template}


def _write(
    path: Path, config: Any, keys: Mapping[str, Any], jobs: Sequence[_Job], chosen: str
) -> None:
    gguf = load_gguf()
    temporary = path.with_name(f".{path.name}.tmp")
    types = {job.name: _type_of(job, chosen) for job in jobs}
    with disk_errors(f"cannot write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(temporary)
        writer = gguf.GGUFWriter(temporary, architecture(config))
        try:
            for key, value in keys.items():
                _add_key(writer, key, value)
            for job in jobs:
                _add_info(gguf, writer, job, types[job.name])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for job in jobs:
                writer.write_tensor_data(_bytes_of(job, DTYPES[types[job.name]]))
            writer.flush()
        except BaseException:
            writer.close()
            temporary.unlink(missing_ok=True)
            raise
        writer.close()
        rename(temporary, path)
        sync_folder(path.parent)


def _add_key(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value:
        writer.add_array(key, value)


def _add_info(gguf: Any, writer: Any, job: _Job, kind: str) -> None:
    import numpy as np

    dtype = gguf.GGMLQuantizationType[kind.upper()]
    num_bytes = DTYPES[kind].itemsize * torch.Size(job.shape).numel()
    writer.add_tensor_info(job.name, job.shape, np.dtype(np.float32), num_bytes, raw_dtype=dtype)


def _bytes_of(job: _Job, dtype: torch.dtype) -> Any:
    tensor = job.make().to(dtype)
    if not torch.isfinite(tensor).all():
        raise ModelError(
            f"{job.name} has values beyond the largest of {dtype}", fix="use --dtype bf16 or f32"
        )
    return tensor.contiguous().flatten().view(torch.uint8).numpy()
