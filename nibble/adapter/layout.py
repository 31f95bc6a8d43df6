"""Where llama.cpp keeps what transformers has: names, order of rows, keys, per architecture.

    place(config, module)        blk.0.attn_q, and the order in which its rows go
    key_values(config)           llama.block_count, llama.rope.freq_base, ...
    extra_tensors(config)        factors of rotary frequencies, which llama.cpp reads as tensors
    problem(config)              why a model cannot be laid out; empty where it can

Source:
    llama.cpp, release of llama-cpp-python 0.3.36: conversion/*.py writes and src/models/*.cpp reads
    these names and keys.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nibble.errors import UnavailableError

_ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "falcon": "falcon",
}
_GEMMAS = ("gemma", "gemma2", "gemma3_text")
# Layers from one full attention to the next, where a file does not list them.
_SLIDING_PERIOD = {"gemma2": 2, "gemma3_text": 6}
# Models whose queries llama.cpp scales by the width of a hidden state, not by that of a head.
_SCALED_BY_WIDTH = {"gemma2": 46, "gemma3_text": 62}
_ACTIVATIONS = {**dict.fromkeys(_GEMMAS, ("gelu_pytorch_tanh", "gelu")), "falcon": ("gelu",)}
_YARN_KEYS = {"rope_type", "rope_theta", "factor", "original_max_position_embeddings"}


@dataclass(frozen=True)
class Place:
    """Where the tensors of a module go.

    Args:
        name: llama.cpp's, without .weight or .bias.
        rows: The order in which rows go, (O,); None as they are.
        shift: Added to every value: Gemma's norms multiply by 1 + weight.
    """

    name: str
    rows: Tensor | None = None
    shift: float = 0.0


def load_gguf() -> Any:
    """The package that knows the format.

    Raises:
        UnavailableError: If it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise UnavailableError(
            "writing GGUF files needs the package gguf", fix='pip install "nibble[gguf]"'
        ) from None
    return gguf


def architecture(config: Any) -> str:
    """llama.cpp's name of an architecture; empty where this module does not know it."""
    return _ARCHITECTURES.get(config.model_type, "")


def place(config: Any, module: str) -> Place:
    """Where the weight and bias of a module go, named as in the checkpoint.

    Raises:
        UnavailableError: If llama.cpp has no such tensor.
    """
    gguf = load_gguf()
    arch = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == architecture(config))
    name = gguf.get_tensor_name_map(arch, config.num_hidden_layers).get_name(module)
    if name is None:
        raise UnavailableError(
            f"llama.cpp has no tensor for {module} of {config.model_type}",
            fix="use an adapter of the linear layers",
        )
    is_shifted = config.model_type in _GEMMAS and module.endswith("norm")
    return Place(name, _row_order(config, module), 1.0 if is_shifted else 0.0)


def _row_order(config: Any, module: str) -> Tensor | None:
    """The order of the rows of a projection.

    Llama: transformers turns the pairs (i, i + K/2) of a head, llama.cpp neighbours. Of a head of
    4 rows, 0 1 2 3 becomes 0 2 1 3.

    Falcon: the rows come in groups, the queries that share a key, the key, the value; llama.cpp
    wants all queries, all keys, all values. Of 2 groups with 1 query of 1 row, 0 1 2 3 4 5 becomes
    0 3 1 4 2 5.
    """
    last = module.rpartition(".")[2]
    if architecture(config) == "llama" and last in ("q_proj", "k_proj"):
        is_query = last == "q_proj"
        heads = config.num_attention_heads if is_query else config.num_key_value_heads
        rows = torch.arange(heads * _head_dim(config))
        return rows.view(heads, 2, -1).transpose(1, 2).reshape(-1)
    if last == "query_key_value":
        groups = _num_kv_heads(config)
        share = config.num_attention_heads // groups
        rows = torch.arange(groups * (share + 2) * _head_dim(config))
        rows = rows.view(groups, share + 2, -1)
        parts = rows[:, :share], rows[:, share], rows[:, share + 1]
        return torch.cat([part.reshape(-1) for part in parts])
    return None


def key_values(config: Any) -> dict[str, Any]:
    """The keys of the architecture; integers are unsigned, floats are of 32 bits."""
    width, heads = config.hidden_size, config.num_attention_heads
    is_falcon = config.model_type == "falcon"
    keys: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": width,
        "feed_forward_length": config.ffn_hidden_size if is_falcon else config.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": _num_kv_heads(config),
        "attention.key_length": _head_dim(config),
        "attention.value_length": _head_dim(config),
        "vocab_size": config.vocab_size,
        **_rope_keys(config),
        **_sliding_keys(config),
    }
    if is_falcon:
        keys["tensor_data_layout"] = "jploski"
        keys["attention.layer_norm_epsilon"] = float(config.layer_norm_epsilon)
    else:
        keys["attention.layer_norm_rms_epsilon"] = float(config.rms_norm_eps)
    if num_experts := _num_experts(config):
        keys["expert_count"] = num_experts
        keys["expert_used_count"] = config.num_experts_per_tok
        keys["expert_feed_forward_length"] = (
            getattr(config, "moe_intermediate_size", None) or config.intermediate_size
        )
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config.model_type in _GEMMAS and getattr(config, key, None):
            keys[key] = float(getattr(config, key))
    return {f"{architecture(config)}.{key}": value for key, value in keys.items()}


def extra_tensors(config: Any) -> dict[str, Tensor]:
    """Factors by which llama.cpp divides the rotary frequencies, (K / 2,) in float32."""
    rope = _rope(config)
    if rope["rope_type"] == "llama3":
        return {"rope_freqs.weight": _llama3_factors(rope, _head_dim(config))}
    if rope["rope_type"] == "longrope":
        return {
            f"rope_factors_{length}.weight": torch.tensor(rope[f"{length}_factor"])
            for length in ("long", "short")
        }
    return {}


def problem(config: Any) -> str:
    """Why llama.cpp would not compute what this model computes; empty where it would."""
    kind = config.model_type
    if not architecture(config):
        return f"nibble does not know how llama.cpp lays out {kind}"
    active = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    active = active or getattr(config, "activation", None)
    num_query = getattr(config, "query_pre_attn_scalar", _head_dim(config))
    by_width = config.num_hidden_layers == _SCALED_BY_WIDTH.get(kind)
    scale_of = config.hidden_size // config.num_attention_heads if by_width else _head_dim(config)
    wrong = {
        f"its activation is {active}": active not in _ACTIVATIONS.get(kind, ("silu",)),
        f"query_pre_attn_scalar is {num_query}, not {scale_of}": num_query != scale_of,
        "it attends in both directions": getattr(config, "use_bidirectional_attention", False),
        "its layers slide": getattr(config, "use_sliding_window", False),
        "some of its layers have no experts": getattr(config, "mlp_only_layers", None)
        or getattr(config, "decoder_sparse_step", 1) != 1,
        "norm_topk_prob is false": kind == "qwen3_moe" and not config.norm_topk_prob,
        "its layers have biases": kind == "falcon" and config.bias,
        "attention and feed-forward do not run side by side": kind == "falcon"
        and not (config.parallel_attn or config.new_decoder_architecture),
        f"its positions are {_rope(config)['rope_type']}": not _is_known_rope(config),
    }
    found = [what for what, is_wrong in wrong.items() if is_wrong]
    return f"{found[0]}, which llama.cpp does not compute for {kind}" if found else ""


def notes(config: Any) -> list[str]:
    """What llama.cpp computes otherwise than transformers, and from where on."""
    window = getattr(config, "sliding_window", None)
    is_ignored = config.model_type in ("mistral", "mixtral", "phi3")
    if is_ignored and window and window < config.max_position_embeddings:
        return [
            f"llama.cpp does not limit attention to the last {window:,} tokens for "
            f"{config.model_type}: answers agree up to that length"
        ]
    return []


def _rope(config: Any) -> dict[str, Any]:
    rope = config.rope_parameters
    return dict(rope.get("full_attention", rope))


def _is_known_rope(config: Any) -> bool:
    rope = _rope(config)
    kind = rope["rope_type"]
    if kind == "longrope":
        return config.model_type == "phi3" and "attention_factor" not in rope
    if kind == "yarn":
        return not rope.keys() - _YARN_KEYS
    return kind in ("default", "linear") or (kind == "llama3" and architecture(config) == "llama")


def _rope_keys(config: Any) -> dict[str, Any]:
    rope = _rope(config)
    rotated = int(_head_dim(config) * rope.get("partial_rotary_factor", 1.0))
    keys: dict[str, Any] = {
        "rope.dimension_count": rotated,
        "rope.freq_base": float(rope["rope_theta"]),
    }
    local = config.rope_parameters.get("sliding_attention")
    if local:
        keys["rope.freq_base_swa"] = float(local["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        keys["rope.scaling.type"] = rope["rope_type"]
        keys["rope.scaling.factor"] = float(rope["factor"])
    original: Any = rope.get("original_max_position_embeddings") or getattr(
        config, "original_max_position_embeddings", None
    )
    if original and (rope["rope_type"] == "yarn" or config.model_type == "phi3"):
        keys["rope.scaling.original_context_length"] = original
    if rope["rope_type"] == "longrope":
        keys["rope.scaling.type"] = "longrope"
        ratio = config.max_position_embeddings / original
        factor = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
        keys["rope.scaling.attn_factor"] = factor
    return keys


def _sliding_keys(config: Any) -> dict[str, Any]:
    if config.model_type == "phi3":
        return {"attention.sliding_window": getattr(config, "sliding_window", None) or 0}
    period = _SLIDING_PERIOD.get(config.model_type)
    if period is None:
        return {}
    keys: dict[str, Any] = {"attention.sliding_window": config.sliding_window}
    slides = [kind == "sliding_attention" for kind in config.layer_types]
    if slides != [(number + 1) % period != 0 for number in range(len(slides))]:
        keys["attention.sliding_window_pattern"] = [int(one) for one in slides]
    return keys


def _llama3_factors(rope: dict[str, Any], head_dim: int) -> Tensor:
    """1 for quick frequencies, `factor` for slow ones, between them in proportion."""
    inverse = 1.0 / rope["rope_theta"] ** (torch.arange(0, head_dim, 2).float() / head_dim)
    turns = rope["original_max_position_embeddings"] * inverse / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - share) / rope["factor"] + share)


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _num_kv_heads(config: Any) -> int:
    if config.model_type != "falcon":
        return config.num_key_value_heads
    is_shared = config.multi_query and not config.new_decoder_architecture
    return 1 if is_shared else config.num_kv_heads


def _num_experts(config: Any) -> int:
    return getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 0
