"""How fast are the Triton kernels: decoding against a copy, the others against torch.

    python benchmarks/triton_kernels.py [--write]

Bytes are those that have to be read and written. Before each run other data goes through the L2
cache, so that memory is what is measured. The goal for decoding is 85 % of the rate of a copy.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from recording import machine, write_results

from nibble.kernels import cross_entropy, layers, nf4, rotary
from nibble.kernels.library import library_for

WEIGHTS = ((4096, 4096), (14336, 4096), (8192, 28672))
GOAL = 0.85
ROUNDS, ROUNDS_REFERENCE = 30, 5
# A step of an 8B model.
TOKENS, HIDDEN, WIDE, HEADS, KEY_HEADS, WIDTH, VOCABULARY = 4096, 4096, 14336, 32, 8, 128, 128_256
CACHE_BYTES = 256 << 20
NO_CUDA = 69


def milliseconds(work: Callable[[], object], rounds: int = ROUNDS) -> float:
    """The median; the first run, which compiles, is dropped."""
    other = torch.empty(CACHE_BYTES, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(rounds + 1):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        other.zero_()
        start.record()
        work()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times[1:])


def draw(*shape: int) -> torch.Tensor:
    """Values in bfloat16 on the device."""
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def copy_rate() -> float:
    """GB/s read and written by torch's copy of 1 GiB."""
    source = torch.zeros(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / milliseconds(lambda: target.copy_(source)) / 1e6


def decoding(copied: float) -> Iterator[str]:
    """A row for each weight."""
    yield "| weight | ms | GB/s | of a copy | goal met | torch reference, ms | ratio |"
    yield "|---|---|---|---|---|---|---|"
    for shape in WEIGHTS:
        q, out = nf4.quantize(draw(*shape)), draw(*shape)
        ours = milliseconds(lambda q=q, out=out: nf4.dequantize(q, out=out))
        theirs = milliseconds(
            lambda q=q, out=out: nf4.dequantize_reference(q, out=out), ROUNDS_REFERENCE
        )
        rate = (q.nbytes + out.nbytes) / ours / 1e6
        yield (
            f"| {shape[0]} x {shape[1]} | {ours:.3f} | {rate:.0f} | {rate / copied:.0%} "
            f"| {'yes' if rate >= GOAL * copied else 'no'} | {theirs:.2f} | {theirs / ours:.0f} |"
        )


def operations() -> Iterator[tuple[str, Callable[[], object]]]:
    """Forward and backward of each operation of a layer, and a chunk of the head."""
    x, weight, grad = draw(TOKENS, HIDDEN).requires_grad_(), draw(HIDDEN), draw(TOKENS, HIDDEN)
    yield "norm", lambda: layers.rms_norm(x.detach(), weight, 1e-5, unit_offset=False)
    yield (
        "norm, both ways",
        lambda: torch.autograd.grad(layers.rms_norm(x, weight, 1e-5, unit_offset=False), x, grad),
    )
    units = [draw(TOKENS, WIDE).requires_grad_() for _ in range(2)]
    grad_unit = draw(TOKENS, WIDE)
    for activation in layers.ACTIVATIONS:
        yield (
            activation,
            lambda activation=activation: layers.gated(
                *(unit.detach() for unit in units), activation
            ),
        )
        yield (
            f"{activation}, both ways",
            lambda activation=activation: torch.autograd.grad(
                layers.gated(*units, activation), units, grad_unit
            ),
        )
    # Token by token, as products give them.
    query, key = (
        draw(1, TOKENS, heads, WIDTH).transpose(1, 2).requires_grad_()
        for heads in (HEADS, KEY_HEADS)
    )
    cos, grads = draw(1, TOKENS, WIDTH), [torch.ones_like(x) for x in (query, key)]
    yield "rotation", lambda: rotary.rotary(query.detach(), key.detach(), cos, cos)
    yield (
        "rotation, both ways",
        lambda: torch.autograd.grad(rotary.rotary(query, key, cos, cos), (query, key), grads),
    )
    logits = draw(cross_entropy.CHUNK_ROWS, VOCABULARY)
    labels = torch.arange(len(logits), device="cuda")
    for name, softcap in (("head", None), ("head, soft cap", 30.0)):
        shape = cross_entropy._Shape(softcap, 1.0)
        yield name, lambda shape=shape: cross_entropy._loss_and_gradient_(logits, labels, shape)


def against_torch() -> Iterator[str]:
    """A row for each operation."""
    yield "| operation | Triton, ms | torch, ms | ratio |"
    yield "|---|---|---|---|"
    for name, work in operations():
        ours = milliseconds(work)
        with (
            mock.patch.object(layers, "library_for", return_value=None),
            mock.patch.object(rotary, "library_for", return_value=None),
            mock.patch.object(cross_entropy, "library_for", return_value=None),
        ):
            theirs = milliseconds(work)
        yield f"| {name} | {ours:.3f} | {theirs:.3f} | {theirs / ours:.1f} |"


def main() -> None:
    """Print the tables; write them if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="also write benchmarks/results/")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("there is no CUDA device on this machine: nothing measured", file=sys.stderr)
        raise SystemExit(NO_CUDA)
    import triton

    copied = copy_rate()
    has_kernels = library_for(draw(2, 2)) is not None
    lines = [
        "# Triton kernels, bfloat16",
        "",
        f"Device: {machine('cuda')}; a copy moves {copied:.0f} GB/s. 4-bit weights: "
        f"{nf4.implementation('cuda')}; layers: {'Triton' if has_kernels else 'torch'}. "
        f"torch {torch.__version__}, Triton {triton.__version__}. Medians of {ROUNDS} runs, "
        f"{ROUNDS_REFERENCE} of the reference. Operations as in a layer of an 8B model with "
        f"{TOKENS:,} tokens, the head with {cross_entropy.CHUNK_ROWS} rows.",
        "",
        *decoding(copied),
        "",
        *against_torch(),
    ]
    print("\n".join(lines))
    if arguments.write:
        write_results("triton_kernels", lines, "cuda")


if __name__ == "__main__":
    main()
