"""Peak memory of a step as documents grow from 512 to 8,192 tokens, on a CPU.

    python benchmarks/memory_by_length.py [--write]

The Llama of vs_peers.py, one document a step. Peaks are those of a process above what it held
before loading, and those that the planner gives. The exit code is 1 where a measured peak is more
than 10 % off its plan, or where memory grows by more a token than the ledger
says: with D, KV, F the widths of hidden, key and gated unit, values of bfloat16 per token

    none    L (4D + 2KV + 2F) are kept, and one layer works with D + 3F
    full    L D are kept, and one layer works with 9D + 4F
    both    2D for the hidden states at the head and their gradient

beside ids, labels and 1/rms of the norms. Logits of all tokens would add V values or more. Growth
is the slope of a line through all lengths.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from recording import machine, write_results
from shapes import Shape, make_folder
from vs_peers import ALPHA, RANK

from nibble.config import load_config
from nibble.plan import simulate
from nibble.plan.budget import CPU_SCRATCH_BYTES

LENGTHS = (512, 1024, 2048, 4096, 8192)
CASES = (("lora", "none"), ("lora", "full"), ("qlora", "none"), ("qlora", "full"))
# As runs do whose memory is short: without it the holes of the heap count.
DENSE = {"MALLOC_MMAP_THRESHOLD_": str(1 << 18)}
VALUE_BYTES, LIMIT = 2, 0.10


def ledger_slope(shape: Shape, recompute: str) -> float:
    """Bytes that a token adds to the peak."""
    width, unit = shape.width, shape.intermediate
    kv = width // shape.heads * shape.kv_heads
    if recompute == "none":
        values = shape.layers * (4 * width + 2 * kv + 2 * unit) + width + 3 * unit
    else:
        values = shape.layers * width + 9 * width + 4 * unit
    # Ids, labels and positions of 8 bytes; one float32 of each norm.
    return VALUE_BYTES * (values + 2 * width) + 3 * 8 + 4 * (2 * shape.layers + 1)


def measured_bytes(method: str, recompute: str, tokens: int, folder: Path) -> int:
    """Peak of three steps in a process of its own."""
    script = Path(__file__).with_name("vs_peers.py")
    words = [sys.executable, str(script), "--peak-of", f"nibble,{method},{recompute}"]
    words += ["--tokens", str(tokens), "--folder", str(folder)]
    done = subprocess.run(
        words, check=True, capture_output=True, text=True, env={**os.environ, **DENSE}
    )
    return int(done.stdout.split()[-1])


def planned_bytes(method: str, recompute: str, tokens: int, folder: Path) -> int:
    """The simulated peak of tensors, and what libraries keep beside them."""
    run = load_config(
        None,
        [
            f"method={method}", f"train.recompute={recompute}", f"lora.rank={RANK}",
            f"lora.alpha={ALPHA}", "optim.paged=false",
        ],
    )  # fmt: skip
    shape = simulate.Shape(((tokens,),))
    values = json.loads((folder / "config.json").read_text())
    peak = simulate.simulate(run, values, shape, device="cpu").peak
    return peak.bytes + CPU_SCRATCH_BYTES


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="Put the table into results/.")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    arguments = parser.parse_args()
    shape = Shape()
    rows = ["| method | recompute | tokens | measured MB | planned MB | off |"]
    rows.append("|---|---|---|---|---|---|")
    slopes = [
        "| method | recompute | measured bytes a token | in the ledger |",
        "|---|---|---|---|",
    ]
    is_right = True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_folder(shape, folder)
        for method, recompute in CASES:
            found = []
            for tokens in arguments.lengths:
                measured = measured_bytes(method, recompute, tokens, folder)
                planned = planned_bytes(method, recompute, tokens, folder)
                off = planned / measured - 1
                is_right &= abs(off) <= LIMIT
                found.append((tokens, measured))
                rows.append(
                    f"| {method} | {recompute} | {tokens:,} | {measured / 1e6:,.0f} "
                    f"| {planned / 1e6:,.0f} | {off:+.1%} |"
                )
                print(rows[-1], flush=True)
            allowed = ledger_slope(shape, recompute)
            slope = statistics.linear_regression(*zip(*found, strict=True)).slope
            is_right &= slope <= allowed
            slopes.append(f"| {method} | {recompute} | {slope:,.0f} | {allowed:,.0f} |")
            print(slopes[-1], flush=True)
    lines = [
        "# Peak memory by length of a document",
        "",
        f"Device: {machine()}, {torch.get_num_threads()} thread(s). torch {torch.__version__}. "
        f"{shape.layers} layers of width {shape.width}, vocabulary {shape.vocabulary:,}, "
        f"adapters of rank {RANK}.",
        "",
        *rows,
        "",
        *slopes,
    ]
    if arguments.write:
        write_results("memory_by_length", lines)
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
