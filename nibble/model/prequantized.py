"""Checkpoints that transformers and bitsandbytes stored in 4 bits, read as they are.

X.weight                                       codes, uint8 (or other types: same bytes)
X.weight.absmax                                block scales, uint8 or float32
X.weight.quant_map                             the 16 values
X.weight.nested_absmax, .nested_quant_map      with double quantisation
X.weight.quant_state.bitsandbytes__nf4         JSON in bytes: type, block size, shape, offset
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nibble.errors import ModelError, NibbleError
from nibble.kernels.nf4 import CODEBOOKS, DYNAMIC_MAP, NESTED_BLOCK_SIZE, Quantized
from nibble.model.tensors import Entry, TensorReader

_STATE = ".quant_state.bitsandbytes__"
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_FIX = "load the 16-bit checkpoint instead"

Parts = dict[str, Entry]


def check_quantization(config: Mapping[str, Any]) -> bool:
    """Whether config.json says that bitsandbytes stored the weights in 4 bits.

    Raises:
        ModelError: If they are quantised in a way that nibble does not read.
    """
    section = config.get("quantization_config")
    if not section:
        return False
    method = section.get("quant_method", "") if isinstance(section, dict) else section
    if isinstance(section, dict) and not method and section.get("load_in_4bit"):
        method = "bitsandbytes"
    if method != "bitsandbytes" or not section.get("load_in_4bit"):
        kind = f"{method} in 8 bits" if method == "bitsandbytes" else method
        raise ModelError(
            f"config.json: the weights are quantised by {kind!r}, which nibble does not read",
            fix="use the 16-bit checkpoint, or one stored in 4 bits by bitsandbytes",
        )
    return True


def split_quantized(entries: Mapping[str, Entry]) -> tuple[dict[str, Entry], dict[str, Parts]]:
    """Entries without the parts of 4-bit weights, and those parts by the weight's name.

    The weight itself stays among the entries.
    """
    parts: dict[str, Parts] = {}
    for key in entries:
        name, separator, _ = key.partition(_STATE)
        if separator:
            known = {part: f"{name}.{part}" for part in _PARTS}
            parts[name] = {part: entries[k] for part, k in known.items() if k in entries}
            parts[name]["state"] = entries[key]
    used = {entry.name for part in parts.values() for entry in part.values()}
    return {key: entry for key, entry in entries.items() if key not in used}, parts


def read_quantized(codes: Entry, parts: Parts, reader: TensorReader) -> Quantized:
    """The stored weight, bit for bit.

    Raises:
        ModelError: If a part is missing or does not fit.
    """
    try:
        state = json.loads(bytes(reader.read(parts["state"]).numpy()))
        shape = tuple(int(dim) for dim in state["shape"])
        q = Quantized(
            codes=reader.read(codes).reshape(-1).view(torch.uint8),
            absmax=reader.read(parts["absmax"]).reshape(-1),
            nested_absmax=reader.read(parts["nested_absmax"]) if "nested_absmax" in parts else None,
            offset=torch.tensor([state["nested_offset"]]) if "nested_offset" in state else None,
            shape=shape,
            type=str(state["quant_type"]),
            block_size=int(state["blocksize"]),
        )
        tables = {key: reader.read(parts[key]) for key in parts if key.endswith("quant_map")}
    except (KeyError, TypeError, ValueError, NibbleError) as error:
        reason = error.what if isinstance(error, NibbleError) else error
        raise ModelError(
            f"{codes.path}: the 4-bit parts of {codes.name} are broken or incomplete ({reason})",
            fix=_FIX,
        ) from None
    _check(codes, q, tables, int(state.get("nested_blocksize", NESTED_BLOCK_SIZE)))
    return q


def _check(codes: Entry, q: Quantized, tables: dict[str, Tensor], nested_size: int) -> None:
    is_double = q.nested_absmax is not None
    problems = {
        "the type is unknown": q.type not in CODEBOOKS,
        "nested scales come in blocks of 256": is_double and nested_size != NESTED_BLOCK_SIZE,
    }
    for what, is_wrong in problems.items():
        if is_wrong:
            raise ModelError(f"{codes.path}: {codes.name}: {what}", fix=_FIX)
    expected = {"quant_map": CODEBOOKS[q.type], "nested_quant_map": DYNAMIC_MAP}
    for key, table in tables.items():
        if not torch.equal(table.float().flatten(), expected[key]):
            raise ModelError(f"{codes.path}: {codes.name} uses other values in {key}", fix=_FIX)
    scales = q.nested_absmax if is_double else q.absmax
    if scales is None or not torch.isfinite(scales).all():
        raise ModelError(f"{codes.path}: {codes.name} holds scales that are not finite", fix=_FIX)
