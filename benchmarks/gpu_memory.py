"""Peak memory of QLoRA on one GPU, a cap of 8 and of 48 GB, and a run that only pages finish.

    python benchmarks/gpu_memory.py [--write]      on a CUDA device
    python benchmarks/gpu_memory.py --dry-run      a tiny model on the CPU, without limits

Random weights, one document of 2,048 tokens, two steps; bytes allocated by tensors. The exit code
is 1 where a limit is passed, or where pages change a loss.
"""

import argparse
import gc
import sys
from dataclasses import dataclass

import torch
from plan_accuracy import TINY, random_batch, random_model
from recording import machine, write_results

from nibble.config import load_config
from nibble.kernels.nf4 import quantize
from nibble.plan.presets import preset_config
from nibble.train.build import equip
from nibble.train.loss import token_loss
from nibble.train.step import train_step

TOKENS, STEPS = 2048, 2
PLAIN = ("train.recompute=full", "optim.paged=false")
LEAST = (
    "train.recompute=tiled", "model.embeddings=host", "optim.name=adamw8bit", "optim.paged=true",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model, how it is trained, and the most that it may take.

    Args:
        card_gb: Trained under the cap of a card of this size; None has no cap.
    """

    model: str
    settings: tuple[str, ...]
    limit_gb: float
    card_gb: float | None = None


CASES = (
    Case("llama-2-7b", PLAIN, 5.6),
    Case("llama-2-7b", LEAST, 4.6, card_gb=8),
    Case("llama-3.1-8b", PLAIN, 7.7),
    Case("llama-3.1-8b", LEAST, 5.4, card_gb=8),
    Case("llama-2-70b", PLAIN, 47.0, card_gb=48),
    Case("llama-2-70b", LEAST, 40.0, card_gb=48),
)
# What a context and its kernels take of a card beside tensors.
CONTEXT_GB = 0.6


def train(model: str, settings: tuple[str, ...], device: torch.device) -> tuple[list[float], float]:
    """Losses of some steps, and the peak in GB."""
    is_cuda = device.type == "cuda"
    run = load_config(None, ["method=qlora", *settings])
    values = TINY if model == "tiny" else preset_config(model)
    torch.manual_seed(0)
    quantize(torch.ones(64))  # tables that are made once a process
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    base = random_model(run, values, device)
    optimizer = equip(base, run)
    base.train()
    batch = random_batch(TOKENS, device)
    losses = [
        train_step(
            lambda b: token_loss(base, b), [batch], optimizer, lr=1e-3, max_grad_norm=1.0
        ).loss
        for _ in range(STEPS)
    ]
    peak = torch.cuda.max_memory_allocated() if is_cuda else 0
    return losses, peak / 1e9


def forget(device: torch.device) -> None:
    """Give back what a run before has left."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def cap(gigabytes: float | None, device: torch.device) -> None:
    """Let tensors have so much of the device; None lets them have all."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        share = 1.0 if gigabytes is None else min(1.0, gigabytes * 1e9 / total)
        torch.cuda.set_per_process_memory_fraction(share)


def survives(settings: tuple[str, ...], gigabytes: float, device: torch.device) -> list[float]:
    """Losses under a cap; none where memory runs out."""
    cap(gigabytes, device)
    try:
        return train("llama-2-7b", settings, device)[0]
    except torch.OutOfMemoryError:
        return []
    finally:
        cap(None, device)
        forget(device)


def check_pages(device: torch.device) -> tuple[list[str], bool]:
    """A cap between what a large optimizer needs with pages and without: lines, and success."""
    large = ("lora.rank=256", "train.recompute=full")
    plain, paged = (*large, "optim.paged=false"), (*large, "optim.paged=true")
    needs = []
    for settings in (plain, paged):
        losses, peak = train("llama-2-7b", settings, device)
        needs.append(peak)
        forget(device)
    between = sum(needs) / 2
    died, finished = (survives(settings, between, device) for settings in (plain, paged))
    lines = [
        f"Rank 256 on a 7B needs {needs[0]:.2f} GB, with pages {needs[1]:.2f} GB. Capped at "
        f"{between:.2f} GB the plain optimizer {'finishes' if died else 'runs out of memory'}, "
        f"the paged one {'finishes' if finished else 'runs out of memory'}; losses "
        f"{'equal' if finished == losses else 'differ from'} those without a cap."
    ]
    return lines, not died and finished == losses


def main() -> int:
    """Measure, print, and write with --write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--write", action="store_true", help="Put the table into results/.")
    arguments = parser.parse_args()
    if not (arguments.dry_run or torch.cuda.is_available()):
        print("needs a CUDA device, or --dry-run", file=sys.stderr)
        return 69
    device = torch.device("cpu" if arguments.dry_run else "cuda")
    lines = [
        "# Peak memory of QLoRA, one document of 2,048 tokens",
        "",
        f"Device: {machine(device.type)}. torch {torch.__version__}.",
        "",
        "| model | settings | on a card of | allocated GB | limit GB | loss |",
        "|---|---|---|---|---|---|",
    ]
    is_right = True
    for case in CASES:
        cap(case.card_gb and case.card_gb - CONTEXT_GB, device)
        model = "tiny" if arguments.dry_run else case.model
        losses, peak = train(model, case.settings, device)
        is_right &= peak <= case.limit_gb
        card = f"{case.card_gb:g} GB" if case.card_gb else "any size"
        lines.append(
            f"| {case.model} | {', '.join(case.settings)} | {card} | {peak:.2f} "
            f"| {case.limit_gb} | {losses[-1]:.4f} |"
        )
        print(lines[-1], flush=True)
        cap(None, device)
        forget(device)
    if not arguments.dry_run:
        found, is_same = check_pages(device)
        lines += ["", *found]
        is_right &= is_same
    print("\n".join(lines))
    if arguments.write:
        write_results("gpu_memory", lines, device.type)
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
