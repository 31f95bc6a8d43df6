"""From which length on is torch's fused attention faster than plain products, in bf16 on a CPU?

    OMP_NUM_THREADS=1 python benchmarks/short_attention.py

Forward and backward of causal attention over 1,024 tokens in documents of equal length, both
implementations in turn, the best of several rounds.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from nibble.kernels.attention import short_attention, short_attention_reference

NUM_TOKENS = 1024
ROUNDS = 6
SHAPES = {"6 heads on 2, width 64": (6, 2, 64), "32 heads on 8, width 128": (32, 8, 128)}


def seconds(function: Callable[..., Tensor], states: list[Tensor], length: int) -> float:
    """One forward and backward."""
    fresh = [state.clone().requires_grad_() for state in states]
    parts = [state[0].unflatten(1, (-1, length)).transpose(0, 1) for state in fresh]
    started = time.perf_counter()
    y = function(*parts, 0.1)
    y.backward(torch.ones_like(y))
    return time.perf_counter() - started


def main() -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for title, (heads, groups, width) in SHAPES.items():
        states = [
            torch.randn(1, count, NUM_TOKENS, width).bfloat16() for count in (heads, groups, groups)
        ]
        print(title)
        for length in (32, 128, 256, 512, 1024):
            best = [float("inf")] * 2
            for _ in range(ROUNDS):
                for i, function in enumerate((short_attention, short_attention_reference)):
                    best[i] = min(best[i], seconds(function, states, length))
            plain, fused = (1000 * value for value in best)
            ratio = fused / plain
            print(f"{length:>6} tokens: plain {plain:7.1f} ms, fused {fused:7.1f} ms, {ratio:.2f}x")


if __name__ == "__main__":
    main()
