"""Stream a transformers checkpoint, tensor by tensor, into 16-bit or 4-bit storage.

    meta model -> for each tensor: read, convert, quantise or keep -> place -> next

The 16-bit model never exists as a whole: the peak is the result plus one tensor. transformers
defines the architecture; this file decides how its weights are stored.
"""

import copy
import ctypes
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from nibble.errors import ModelError, UsageError, did_you_mean
from nibble.kernels.nf4 import Quantized, quantize
from nibble.model import attention, prequantized
from nibble.model.experts import PARTS, Experts
from nibble.model.families import family_of
from nibble.model.files import find_model, read_config, weight_files
from nibble.model.linear4bit import DenseLinear, Linear4bit

STORAGES = ("bf16", "float32", "nf4", "fp4")
_IN_4_BITS = ("nf4", "fp4")
_QUANT_DEFAULTS = {"block_size": 64, "double": True, "search": False}


def load_base(
    name: str,
    storage: str = "bf16",
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    quant: Mapping[str, Any] | None = None,
    trainable: bool = False,
    device: torch.device | str = "cpu",
) -> tuple[Any, Any]:
    """A causal language model and its tokenizer, ready to be adapted.

    Args:
        name: Hub id, or local folder in the transformers layout.
        storage: "bf16" or "float32" keep every weight so; "nf4" and "fp4" hold all linear layers
            and experts, the head excepted, in 4 bits.
        dtype: Type of what is not in 4 bits, and of every product; None is float32 for storage
            "float32" and bfloat16 otherwise.
        quant: block_size, double and search of `quantize`, where they differ from its defaults.
        trainable: Leave every weight trainable (full fine-tuning); not with 4-bit storage.

    Raises:
        UsageError: If the storage is unknown or does not go with the checkpoint.
        ModelError: If the folder is incomplete, broken, or of an unknown architecture.
        UnavailableError: If a hub id is neither in the cache nor within reach.
    """
    if storage not in STORAGES:
        hint = did_you_mean(storage, STORAGES)
        raise UsageError(f"unknown storage {storage!r}, expected one of {STORAGES}", fix=hint)
    if trainable and storage in _IN_4_BITS:
        raise UsageError("a base in 4 bits cannot be trained itself", fix="use storage float32")
    folder = find_model(name, revision)
    config = read_config(folder)
    dtype = dtype or (torch.float32 if storage == "float32" else torch.bfloat16)
    settings = {"type": storage, **_QUANT_DEFAULTS, **(quant or {})}
    placed = _Placed(settings if storage in _IN_4_BITS else None, trainable, torch.device(device))
    _return_freed_memory()
    model = _build_empty(config, dtype)
    _stream(model, folder, config, placed)
    placed.finish(model)
    model.tie_weights()
    _check_complete(model, folder)
    model.requires_grad_(trainable)
    attention.use_packed_attention(model)
    model.name_or_path = name
    return model.eval(), load_tokenizer(folder)


def load_tokenizer(name: str | Path) -> Any:
    """The tokenizer of a model folder.

    Raises:
        ModelError: If its files are missing or broken.
    """
    folder = find_model(str(name))
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises many kinds here
        raise ModelError(
            f"{folder} holds no tokenizer that can be read: {error}",
            fix="copy tokenizer.json and tokenizer_config.json beside the weights",
        ) from None


class _Placed:
    """Where each tensor goes once it is read."""

    def __init__(
        self, settings: dict[str, Any] | None, trainable: bool, device: torch.device
    ) -> None:
        self.settings = settings
        self.trainable = trainable
        self.device = device
        self.stored: dict[str, Tensor | Quantized] = {}

    def place(self, model: Any, name: str, tensor: Tensor | Quantized) -> None:
        """Put one parameter or buffer into the model, or keep its 4-bit form for `finish`."""
        owner, _, key = name.rpartition(".")
        module = model.get_submodule(owner)
        current = module._parameters.get(key, module._buffers.get(key))
        _check_tensor(name, tensor, current)
        is_expert = _is_experts(module) and key in PARTS
        is_linear = key == "weight" and _is_linear(model, module)
        if isinstance(tensor, Tensor):
            tensor = tensor.to(self.device)
            if self.settings is not None and (is_expert or is_linear):
                tensor = _in_place_named(name, lambda t=tensor: quantize(t, **self.settings))
        if is_expert or isinstance(tensor, Quantized):
            self.stored[name] = tensor
            return
        _check_finite(name, tensor)
        value = tensor.to(current.dtype) if current.is_floating_point() else tensor
        if key in module._parameters:
            value = value.clone() if self.trainable else value
            module._parameters[key] = nn.Parameter(value, requires_grad=False)
        else:
            module._buffers[key] = value

    def finish(self, model: Any) -> None:
        """Swap every linear layer and experts module for one that can be adapted."""
        for name, module in list(model.named_modules()):
            stored = self.stored.get(f"{name}.weight")
            if isinstance(stored, Quantized):
                model.set_submodule(name, Linear4bit(stored, module.bias))
            elif _is_experts(module) and not self.trainable:
                weights = {part: self._expert_weight(f"{name}.{part}", module) for part in PARTS}
                model.set_submodule(name, Experts(module, weights))
            elif _is_experts(module):
                for part in PARTS:
                    weight = self._expert_weight(f"{name}.{part}", module)
                    module._parameters[part] = nn.Parameter(weight)
            elif _is_linear(model, module) and not self.trainable:
                model.set_submodule(name, DenseLinear(module))

    def _expert_weight(self, name: str, module: nn.Module) -> Any:
        stored = self.stored.pop(name, None)
        if stored is None:
            raise ModelError(f"the checkpoint lacks {name!r}", fix="download the model again")
        if isinstance(stored, Quantized):
            return stored
        return stored.to(module._parameters[name.rpartition(".")[2]].dtype)


def _build_empty(config: dict[str, Any], dtype: torch.dtype) -> Any:
    """The model on the meta device, its buffers real."""
    kind = config["model_type"]
    if kind not in CONFIG_MAPPING:
        raise ModelError(
            f"unknown architecture {kind!r} in config.json",
            fix=did_you_mean(kind, CONFIG_MAPPING) or "update transformers, or check config.json",
        )
    values = {k: v for k, v in config.items() if k not in ("model_type", "quantization_config")}
    try:
        parsed = AutoConfig.for_model(kind, **values)
        family_of(parsed)
        parsed.use_cache = True
        implementation = "eager" if kind == "falcon" else attention.NAME
        with _parameters_on_meta():
            return AutoModelForCausalLM.from_config(
                parsed, dtype=dtype, attn_implementation=implementation
            )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"config.json does not describe a {kind} model: {error}") from None


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """New parameters take no memory; buffers, which no checkpoint holds, are computed."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.data.to("meta"), requires_grad=param.requires_grad)
        register(module, name, param)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _stream(model: Any, folder: Path, config: dict[str, Any], placed: _Placed) -> None:
    """Read, convert and place the checkpoint, one target parameter at a time."""
    files = weight_files(folder)
    with _open_files(files) as get:
        if config.get("quantization_config"):
            keys = prequantized.weight_keys(files)
            if placed.settings is None:
                raise UsageError(
                    f"{folder} is stored in 4 bits already", fix="use method=qlora with it"
                )
        else:
            keys = dict.fromkeys(files, None)
        transforms = get_model_conversion_mapping(model)
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        meta = dict(model.state_dict())
        jobs: dict[str, list[tuple[str, str | None]]] = defaultdict(list)
        for key in keys:
            prefix = model.base_model_prefix
            target, pattern = rename_source_key(key, renamings, converters, prefix, meta)
            jobs[target].append((key, pattern))
        for target in sorted(jobs):
            for name, tensor in _read_target(model, target, jobs[target], converters, get):
                if name in meta:
                    placed.place(model, name, tensor)
                elif not _is_tied(model, name):
                    raise ModelError(f"{folder} holds {name!r}, which the model does not have")


def _read_target(
    model: Any,
    target: str,
    sources: list[tuple[str, str | None]],
    converters: list[WeightConverter],
    get: Callable[[str], Any],
) -> Iterator[tuple[str, Any]]:
    key, pattern = sources[0]
    if pattern is None:
        yield target, get(key)
        return
    converter = copy.deepcopy(next(c for c in converters if pattern in c.source_patterns))
    for source, its_pattern in sorted(sources, key=lambda item: _natural(item[0])):
        read = lambda source=source: get(source)  # noqa: E731
        converter.add_tensor(target, source, str(its_pattern), read)  # type: ignore[arg-type]
    for name, value in converter.convert(target, model=model, config=model.config).items():
        yield name, value[0] if isinstance(value, list) else value


@contextmanager
def _open_files(files: Mapping[str, Path]) -> Iterator[Callable[[str], Any]]:
    """A reader of tensors by name; a 4-bit weight comes as `Quantized`."""
    opened: dict[Path, Any] = {}

    def get_plain(key: str) -> Tensor:
        path = files[key]
        if path not in opened:
            opened[path] = safe_open(path, framework="pt")
        return opened[path].get_tensor(key)

    def get(key: str) -> Any:
        is_packed = f"{key}.absmax" in files
        return prequantized.read(key, files, get_plain) if is_packed else get_plain(key)

    yield get
    opened.clear()


def _check_tensor(name: str, tensor: Tensor | Quantized, expected: Tensor) -> None:
    if tuple(tensor.shape) != tuple(expected.shape):
        raise ModelError(
            f"{name} has shape {tuple(tensor.shape)}, config.json says {tuple(expected.shape)}",
            fix="config.json and weights belong to different models",
        )
    is_float = not isinstance(tensor, Tensor) or tensor.is_floating_point()
    if expected.is_floating_point() and not is_float:
        raise ModelError(
            f"{name} is stored as {tensor.dtype}, expected a floating type",
            fix="use the 16-bit checkpoint, or one quantised in 4 bits by bitsandbytes",
        )


def _check_finite(name: str, tensor: Tensor) -> None:
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise ModelError(
            f"{name} holds NaN or infinite values", fix="download the checkpoint again"
        )


def _in_place_named(name: str, work: Callable[[], Quantized]) -> Quantized:
    try:
        return work()
    except ModelError as error:
        raise ModelError(f"{name}: {error.what}", fix=error.fix) from None


def _check_complete(model: Any, folder: Path) -> None:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    missing = [name for name, tensor in tensors if tensor.device.type == "meta"]
    if missing:
        raise ModelError(
            f"{folder} lacks {len(missing)} tensors, the first is {missing[0]!r}",
            fix="download the model again",
        )


def _is_linear(model: Any, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D) and module is not model.get_output_embeddings()


def _is_experts(module: nn.Module) -> bool:
    """Whether a module holds experts as two 3-D parameters (E, O, I)."""
    has_parts = all(part in module._parameters for part in PARTS)
    return has_parts and not getattr(module, "is_transposed", False)


def _is_tied(model: Any, name: str) -> bool:
    return name in (getattr(model, "_tied_weights_keys", None) or {}) or "rotary_emb" in name


def _natural(name: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _return_freed_memory() -> None:
    """Give large freed tensors back to the system at once, so that the peak stays one tensor."""
    if sys.platform == "linux":
        mmap_threshold = -3
        try:
            ctypes.CDLL("libc.so.6").mallopt(mmap_threshold, 1 << 20)
        except OSError:
            return
