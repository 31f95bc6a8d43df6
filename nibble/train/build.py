"""From the config of a run to the storage of its base, its adapters and its optimizer.

Training calls these on a loaded base, planning on one without values.
"""

from typing import Any

import torch
from torch import nn

from nibble.config import RunConfig
from nibble.model.adapt import adapt
from nibble.model.lean import use_lean_layers
from nibble.model.load import build_storage
from nibble.model.place import Storage
from nibble.model.read_rows import use_read_rows
from nibble.model.recompute import apply_recompute
from nibble.model.sharding import shard
from nibble.train.optimizer import AdamW, build_optimizer


def base_options(run: RunConfig) -> dict[str, Any]:
    """The arguments of `load_base` that say how the base is kept."""
    is_full = run.method == "full"
    is_float32 = is_full or run.model.dtype == "float32"
    storage = "float32" if is_float32 else "bf16"
    return {
        "storage": run.quant.type if run.method == "qlora" else storage,
        "dtype": torch.float32 if is_float32 else torch.bfloat16,
        "quant": run.quant.model_dump(exclude={"type"}),
        "trainable": is_full,
        "host_embeddings": run.model.embeddings == "host",
    }


def storage_of(run: RunConfig) -> Storage:
    """How the weights of the base are kept."""
    return build_storage(**base_options(run))


def autocast_of(run: RunConfig) -> torch.dtype | None:
    """The type of products where the weights are wider; None where they are of one type."""
    is_mixed = run.method == "full" and run.model.dtype == "bfloat16"
    return torch.bfloat16 if is_mixed else None


def equip(model: nn.Module, run: RunConfig, shard_on: torch.device | None = None) -> AdamW:
    """Adapt a base in place, set its recompute policy, and make its optimizer.

    Args:
        shard_on: Where the parts of a base go that is cut over the ranks; None leaves it whole.
    """
    if run.method != "full":
        adapt(
            model,
            **run.lora.model_dump(exclude={"dtype"}),
            dtype=getattr(torch, run.lora.dtype),
            generator=torch.Generator().manual_seed(run.train.seed),
        )
        use_lean_layers(model)
    use_read_rows(model)
    apply_recompute(model, run.train.recompute)
    if shard_on is not None:
        shard(model, shard_on)
    return build_optimizer(model, run.optim)
