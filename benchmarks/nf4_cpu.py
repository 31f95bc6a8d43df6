"""How fast is a 4-bit weight dequantised on a CPU: ours, the reference, bitsandbytes.

    python benchmarks/nf4_cpu.py [--write]

Every round times each subject once, in turn; medians are compared. `into a buffer` is how
Linear4bit works; `into new memory` is what bitsandbytes offers (its `out` has no CPU code), so
both are shown. Fresh pages cost more than the look-up from some 20 MB on.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

import bitsandbytes
import bitsandbytes.functional as bnb
import torch
from recording import machine, write_results

from nibble.kernels import nf4

SHAPES = ((1024, 1024), (2048, 5632), (4096, 4096), (11008, 4096))
ROUNDS = 15
ROUNDS_QUANTIZE = 3


def median_seconds(subjects: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Interleaved timing; the first round warms up and is dropped."""
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    for _ in range(rounds + 1):
        for name, subject in subjects.items():
            start = time.perf_counter()
            subject()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def measure(shape: tuple[int, int]) -> dict[str, float]:
    """Seconds by subject for one weight of this shape."""
    weight = (torch.randn(shape) * 0.02).to(torch.bfloat16)
    q = nf4.quantize(weight)
    codes, state = bnb.quantize_4bit(
        weight, quant_type="nf4", compress_statistics=True, blocksize=64
    )
    out = torch.empty_like(weight)
    seconds = median_seconds(
        {
            "into a buffer": lambda: nf4.dequantize(q, out=out),
            "into new memory": lambda: nf4.dequantize(q),
            "bitsandbytes": lambda: bnb.dequantize_4bit(codes, state),
            "copy of 16 bits": lambda: out.copy_(weight),
        },
        ROUNDS,
    )
    seconds |= median_seconds(
        {
            "reference": lambda: nf4.dequantize_reference(q, out=out),
            "quantize": lambda: nf4.quantize(weight),
            "quantize, bitsandbytes": lambda: bnb.quantize_4bit(
                weight, quant_type="nf4", compress_statistics=True, blocksize=64
            ),
        },
        ROUNDS_QUANTIZE,
    )
    return seconds


def table() -> list[str]:
    """The measurements as Markdown."""
    lines = []
    for shape in SHAPES:
        seconds = measure(shape)
        numel = shape[0] * shape[1]
        ours = seconds["into a buffer"]
        if not lines:
            lines = [
                f"| weight | {' | '.join(f'{name}, ms' for name in seconds)} "
                "| bitsandbytes / into a buffer | bitsandbytes / into new memory "
                "| into a buffer, GB/s written |",
                "|---" * (len(seconds) + 4) + "|",
            ]
        lines.append(
            f"| {shape[0]} x {shape[1]} | "
            + " | ".join(f"{value * 1e3:.2f}" for value in seconds.values())
            + f" | {seconds['bitsandbytes'] / ours:.2f}"
            + f" | {seconds['bitsandbytes'] / seconds['into new memory']:.2f}"
            + f" | {2 * numel / ours / 1e9:.1f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="also write benchmarks/results/")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    lines = [
        "# NF4 with double quantisation on a CPU, bfloat16",
        "",
        f"Device: {machine()}, {arguments.threads} thread(s); {nf4.implementation()}. "
        f"torch {torch.__version__}, bitsandbytes {bitsandbytes.__version__}. "
        f"Medians of {ROUNDS} interleaved rounds; {ROUNDS_QUANTIZE} for reference and quantize. "
        f"Load average at the start: {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs.",
        "",
        *table(),
    ]
    print("\n".join(lines))
    if arguments.write:
        write_results("nf4", lines)


if __name__ == "__main__":
    main()
