"""Causal attention in bfloat16 on a CPU: products of blocks against torch's fused attention.

    OMP_NUM_THREADS=1 python benchmarks/cpu_attention.py [--write]

Forward and backward over 4,096 tokens in documents of equal length, both in turn, the best of
several rounds.
"""

import argparse
import time
from collections.abc import Callable

import torch
from recording import machine, write_results
from torch import Tensor

from nibble.kernels.attention import blocked_attention, blocked_attention_reference

NUM_TOKENS = 4096
ROUNDS = 5
LENGTHS = (32, 128, 256, 512, 1024, 2048, 4096)
SHAPES = {"16 heads on 16, width 64": (16, 16, 64), "32 heads on 8, width 128": (32, 8, 128)}


def seconds(function: Callable[..., Tensor], states: list[Tensor], length: int) -> float:
    """One forward and backward."""
    fresh = [state.clone().requires_grad_() for state in states]
    documents = range(0, NUM_TOKENS + 1, length)
    started = time.perf_counter()
    y = function(*fresh, documents, 0.1)
    y.backward(torch.ones_like(y))
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="also write benchmarks/results/")
    write = parser.parse_args().write
    lines = [
        "# Causal attention in bfloat16 on a CPU, forward and backward",
        "",
        f"Device: {machine()}, {torch.get_num_threads()} thread(s). torch {torch.__version__}. "
        f"{NUM_TOKENS:,} tokens, best of {ROUNDS} interleaved rounds.",
        "",
        "| heads | tokens of a document | blocks, ms | torch, ms | faster |",
        "|---|---|---|---|---|",
    ]
    for title, (heads, groups, width) in SHAPES.items():
        states = [
            torch.randn(1, count, NUM_TOKENS, width).bfloat16() for count in (heads, groups, groups)
        ]
        for length in LENGTHS:
            best = [float("inf")] * 2
            for _ in range(ROUNDS):
                for i, function in enumerate((blocked_attention, blocked_attention_reference)):
                    best[i] = min(best[i], seconds(function, states, length))
            ours, theirs = (1000 * value for value in best)
            lines.append(
                f"| {title} | {length:,} | {ours:.1f} | {theirs:.1f} | {theirs / ours:.2f}x |"
            )
    print("\n".join(lines))
    if write:
        write_results("cpu_attention", lines)


if __name__ == "__main__":
    main()
