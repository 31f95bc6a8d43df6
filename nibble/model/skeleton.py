"""A model without weights: transformers' modules on the meta device, buffers computed.

    config.json -> transformers config -> modules, every parameter on meta

Architectures come from transformers; nothing that a model folder names is imported or run.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from nibble.errors import ModelError, did_you_mean
from nibble.model.attention import NAME, use_packed_attention
from nibble.model.families import FAMILIES, family_of, supported_names

# Above any model there is, below what overflows.
LARGEST_SIZE = 10**7
_SIZES = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size",
)  # fmt: skip
# What every published config.json states; of the rest, some rely on transformers' defaults.
_STATED = ("hidden_size", "num_hidden_layers")
_LARGEST_BUFFERS_BYTES = 256_000_000
# Values that belong to how a checkpoint was stored, not to the architecture.
_STORAGE_KEYS = ("quantization_config", "torch_dtype", "dtype", "attn_implementation")


def build_config(values: dict[str, Any]) -> PreTrainedConfig:
    """The transformers config of the values in config.json.

    Raises:
        ModelError: If the architecture is unknown or a value does not fit it.
    """
    model_type = values["model_type"]
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or model_type not in CONFIG_MAPPING:
        close = did_you_mean(model_type, FAMILIES)
        raise ModelError(
            f"unknown architecture {model_type!r}; nibble is tested with "
            f"{', '.join(supported_names())}",
            fix=close or "use a text model of one of these architectures",
        )
    if "vision_config" in values or "audio_config" in values:
        raise ModelError(
            f"{model_type!r} is not a text-only model", fix="use the text model of the family"
        )
    kept = {key: value for key, value in values.items() if not _is_taken(key)}
    _require_sizes(model_type, kept)
    try:
        config = CONFIG_MAPPING[model_type].from_dict(kept)
    except Exception as error:  # transformers raises many kinds for a value that does not fit
        raise ModelError(
            f"config.json does not fit {model_type!r}: {error}", fix="download config.json again"
        ) from None
    family_of(config)
    for key in _SIZES:
        count = getattr(config, key, 1)
        if isinstance(count, int) and not 1 <= count <= LARGEST_SIZE:
            raise ModelError(
                f"config.json says {key}: {count}, expected 1 to {LARGEST_SIZE:,}",
                fix="download config.json again",
            )
    return config


def _is_taken(key: str) -> bool:
    """A key of the storage, or the name of a method or table of transformers' own."""
    own = getattr(PreTrainedConfig, key, None)
    return key in _STORAGE_KEYS or callable(own) or isinstance(own, dict | tuple)


def _require_sizes(model_type: str, values: dict[str, Any]) -> None:
    """Refuse a config without its main sizes: transformers would put those of another model."""
    aliases = CONFIG_MAPPING[model_type].attribute_map
    missing = [key for key in _STATED if not {key, aliases.get(key)} & values.keys()]
    if missing:
        raise ModelError(
            f"config.json lacks {', '.join(missing)}",
            fix="download config.json again, or write what the model has",
        )


def build_skeleton(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The modules of a causal language model with packed attention and no weights.

    Raises:
        ModelError: If transformers cannot build it.
    """
    # Falcon chooses its attention from a fixed table and is patched afterwards.
    attention = "sdpa" if config.model_type == "falcon" else NAME
    try:
        _check_buffers(config, attention)
        with parameters_on_meta():
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=attention
            )
    except ModelError:
        raise
    except Exception as error:  # as above: shapes that do not divide, missing keys, wrong types
        raise ModelError(
            f"{config.model_type!r} cannot be built from config.json: {error}",
            fix="check its sizes; heads must divide the hidden size",
        ) from None
    use_packed_attention(model)
    return model


def _check_buffers(config: PreTrainedConfig, attention: str) -> None:
    """Refuse an unlisted architecture whose tables, such as masks, would fill memory."""
    if family_of(config).is_first_class:
        return
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    total = sum(buffer.nbytes for buffer in model.buffers())
    if total > _LARGEST_BUFFERS_BYTES:
        raise ModelError(
            f"{config.model_type!r}: its tables take {total:,} bytes, expected at most "
            f"{_LARGEST_BUFFERS_BYTES:,}",
            fix="check the number of positions in config.json",
        )


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules made in this context get their parameters on the meta device, buffers stay real."""
    register = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, param)
        if param is not None:
            self._parameters[name] = nn.Parameter(param.to("meta"), requires_grad=False)

    nn.Module.register_parameter = register_on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register
