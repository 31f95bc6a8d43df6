"""Concrete settings for every `auto` value, each with its reason.

method             lora if the 16-bit base takes at most half of the free memory, else qlora
micro_batch_size   rows that fit 4,096 tokens, at least 1
recompute          none if all activations fit in half of what the base leaves, else full
paged              false
"""

from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from nibble.config import RunConfig
from nibble.model.files import find_model, read_config, read_index
from nibble.train.memory import available_bytes

MICRO_BATCH_TOKENS = 4096
BASE_SHARE = 0.5
ACTIVATION_SHARE = 0.5
BYTES_PER_VALUE = {"bfloat16": 2, "float32": 4}
# Values, gradients and two moments in float32.
FULL_BYTES_PER_WEIGHT = 16
NF4_BYTES_PER_WEIGHT = 0.516


@dataclass(frozen=True)
class Base:
    """What the rules need to know of a base, read off its folder."""

    num_weights: float
    hidden_size: int
    key_value_size: int
    intermediate_size: int
    num_layers: int

    @property
    def kept_values_per_token(self) -> int:
        """Activations kept for backward without recomputing: (4 D + 2 KV + 2 F) per layer.

        Source:
            res_in, res_mid, q, o (D each), k, v (KV each), gate, up (F each).
        """
        per_layer = 4 * self.hidden_size + 2 * self.key_value_size + 2 * self.intermediate_size
        return self.num_layers * per_layer


def resolve(run: RunConfig) -> tuple[RunConfig, list[str]]:
    """The run with concrete values, and one sentence per choice."""
    reasons: list[str] = []
    if "auto" not in (run.method, run.train.micro_batch_size, run.train.recompute, run.optim.paged):
        return run, reasons
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    free = available_bytes(device)
    base = _read_base(run)
    chosen: dict[str, Any] = {}
    if run.method == "auto":
        chosen["method"] = _method(base, free, reasons)
    run = run.with_values(chosen, "planner")
    if run.train.micro_batch_size == "auto":
        rows = max(1, MICRO_BATCH_TOKENS // run.data.max_seq_len)
        chosen["train.micro_batch_size"] = min(rows, run.train.batch_size)
        reasons.append(
            f"{chosen['train.micro_batch_size']} rows per forward pass: up to "
            f"{MICRO_BATCH_TOKENS} tokens of rows of at most {run.data.max_seq_len}."
        )
    run = run.with_values(chosen, "planner")
    if run.train.recompute == "auto":
        chosen["train.recompute"] = _recompute(run, base, free, reasons)
    if run.optim.paged == "auto":
        chosen["optim.paged"] = False
    return run.with_values(chosen, "planner"), reasons


def _method(base: Base, free: int, reasons: list[str]) -> str:
    dense = 2 * base.num_weights
    method = "lora" if dense <= BASE_SHARE * free else "qlora"
    relation = "at most" if method == "lora" else "more than"
    reasons.append(
        f"{method}: the base takes {dense / 1e9:.2f} GB in 16 bits, {relation} half of the "
        f"{free / 1e9:.1f} GB that are free."
    )
    return method


def _recompute(run: RunConfig, base: Base, free: int, reasons: list[str]) -> str:
    weights = {
        "lora": BYTES_PER_VALUE[run.model.dtype] * base.num_weights,
        "qlora": NF4_BYTES_PER_WEIGHT * base.num_weights,
        "full": FULL_BYTES_PER_WEIGHT * base.num_weights,
    }[run.method]
    tokens = int(run.train.micro_batch_size) * run.data.max_seq_len
    kept = base.kept_values_per_token * tokens * BYTES_PER_VALUE[run.model.dtype]
    policy = "none" if kept <= ACTIVATION_SHARE * max(0, free - weights) else "full"
    reasons.append(
        f"recompute {policy}: {tokens} tokens keep about {kept / 1e9:.2f} GB of activations."
    )
    return policy


def _read_base(run: RunConfig) -> Base:
    folder = find_model(run.model.name, run.model.revision)
    config = read_config(folder)
    text = config.get("text_config", config)
    heads = text.get("num_attention_heads") or 1
    hidden = text.get("hidden_size") or text.get("n_embd") or 0
    head_dim = text.get("head_dim") or hidden // heads
    return Base(
        num_weights=sum(prod(entry.shape) for entry in read_index(folder).values()),
        hidden_size=hidden,
        key_value_size=head_dim * (text.get("num_key_value_heads") or heads),
        intermediate_size=text.get("intermediate_size") or 4 * hidden,
        num_layers=text.get("num_hidden_layers") or text.get("n_layer") or 1,
    )
