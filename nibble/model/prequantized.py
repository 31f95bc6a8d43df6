"""4-bit weights as transformers and bitsandbytes store them.

    X.weight                                   codes, uint8 (n / 2, 1), or the same bytes wider
    X.weight.absmax                            uint8 with double quantisation, else float32
    X.weight.quant_map                         the 16 values
    X.weight.nested_absmax, .nested_quant_map  with double quantisation
    X.weight.quant_state.bitsandbytes__nf4     JSON: block size, shape, offset
"""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from nibble.errors import ModelError
from nibble.kernels.nf4 import CODEBOOKS, DYNAMIC_MAP, NESTED_BLOCK_SIZE, Quantized

_STATE = ".quant_state.bitsandbytes__"
_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")


def weight_keys(names: Iterable[str]) -> dict[str, None]:
    """The tensors of the model itself, without the parts of 4-bit weights."""
    return {n: None for n in names if _STATE not in n and not n.endswith(_PARTS)}


def read(key: str, names: Mapping[str, Path], get: Callable[[str], Tensor]) -> Quantized:
    """The 4-bit weight `key`, its bits as they are.

    Raises:
        ModelError: If its description is missing or is not what `nf4` and `fp4` are.
    """
    described = [name for name in names if name.startswith(key + _STATE)]
    if len(described) != 1:
        raise ModelError(f"{key} is in 4 bits but lacks its description (quant_state)")
    kind = described[0].rpartition("__")[2]
    try:
        state = json.loads(bytes(get(described[0]).tolist()))
        shape, block_size = tuple(state["shape"]), int(state["blocksize"])
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"the description of {key} is broken: {error}") from None
    is_known = kind in CODEBOOKS and torch.equal(get(f"{key}.quant_map"), CODEBOOKS[kind])
    if not is_known:
        raise ModelError(f"{key} uses the 4-bit code {kind!r}, which is not known")
    nested = offset = None
    if "nested_offset" in state:
        nested = get(f"{key}.nested_absmax")
        offset = torch.tensor([state["nested_offset"]], dtype=torch.float32)
        is_ours = torch.equal(get(f"{key}.nested_quant_map"), DYNAMIC_MAP)
        if not is_ours or state.get("nested_blocksize") != NESTED_BLOCK_SIZE:
            raise ModelError(f"{key}: its scales are stored in an unknown 8-bit code")
    codes = get(key).view(torch.uint8).flatten()
    return Quantized(codes, get(f"{key}.absmax"), nested, offset, shape, kind, block_size)
