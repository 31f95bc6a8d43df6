"""Weights in 4 bits as transformers and bitsandbytes write them; `model.prequantized` reads them.

A weight X of (O, I) becomes X (codes), X.absmax, X.quant_map, X.quant_state.bitsandbytes__nf4,
and with double quantisation X.nested_absmax and X.nested_quant_map.
"""

import json
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from nibble.kernels.nf4 import CODEBOOKS, DYNAMIC_MAP, NESTED_BLOCK_SIZE, Quantized
from nibble.model.tensors import Spec

# The JSON of a state in bytes, filled up with spaces: its length is known before its values.
_STATE_BYTES = 512


def specs_4bit(name: str, shape: tuple[int, ...], settings: Mapping[str, Any]) -> dict[str, Spec]:
    """Type and shape of each tensor that stores a weight."""
    numel = prod(shape)
    num_blocks = -(-numel // settings["block_size"])
    is_double = settings["double"]
    specs = {
        name: Spec(torch.uint8, ((numel + 1) // 2, 1)),
        f"{name}.absmax": Spec(torch.uint8 if is_double else torch.float32, (num_blocks,)),
        f"{name}.quant_map": Spec(torch.float32, (16,)),
        _state_name(name, settings["type"]): Spec(torch.uint8, (_STATE_BYTES,)),
    }
    if is_double:
        num_nested = -(-num_blocks // NESTED_BLOCK_SIZE)
        specs[f"{name}.nested_absmax"] = Spec(torch.float32, (num_nested,))
        specs[f"{name}.nested_quant_map"] = Spec(torch.float32, (256,))
    return specs


def tensors_4bit(name: str, q: Quantized, dtype: torch.dtype) -> dict[str, Tensor]:
    """The values of `specs_4bit`.

    Args:
        dtype: The type in which the model computes.
    """
    state: dict[str, Any] = {
        "quant_type": q.type,
        "blocksize": q.block_size,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(q.shape),
    }
    tensors = {
        name: q.codes.view(-1, 1),
        f"{name}.absmax": q.absmax,
        f"{name}.quant_map": CODEBOOKS[q.type],
    }
    if q.nested_absmax is not None and q.offset is not None:
        tensors[f"{name}.nested_absmax"] = q.nested_absmax
        tensors[f"{name}.nested_quant_map"] = DYNAMIC_MAP
        state |= {"nested_blocksize": NESTED_BLOCK_SIZE, "nested_dtype": "float32"}
        state["nested_offset"] = float(q.offset)
    text = json.dumps(state).encode().ljust(_STATE_BYTES)
    tensors[_state_name(name, q.type)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return tensors


def config_4bit(
    settings: Mapping[str, Any], dtype: torch.dtype, dense_linears: Sequence[str]
) -> dict[str, Any]:
    """What config.json says of such weights, and of the linear layers that are none."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": settings["type"],
        "bnb_4bit_use_double_quant": settings["double"],
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": list(dense_linears),
    }


def _state_name(name: str, type: str) -> str:
    return f"{name}.quant_state.bitsandbytes__{type}"
