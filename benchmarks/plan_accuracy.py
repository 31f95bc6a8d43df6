"""Predicted peak memory against torch.cuda.max_memory_allocated and max_memory_reserved.

    python benchmarks/plan_accuracy.py [--write]      on a CUDA device
    python benchmarks/plan_accuracy.py --dry-run      tiny shapes on the CPU, against the tracker

Random weights of 1B to 70B shapes, one training step and one evaluation each. A case that its plan
says does not fit the device is left out. The exit code is 1 where the mean is more than 2 % off or
one case more than 5 %.
"""

import argparse
import gc
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from nibble.config import load_config
from nibble.data.loader import Batch
from nibble.kernels.nf4 import quantize
from nibble.model.linear4bit import fresh_scratch
from nibble.model.names import tied_names
from nibble.model.place import Placer
from nibble.model.skeleton import build_config, build_skeleton
from nibble.plan.budget import budget_bytes, workspace_bytes
from nibble.plan.devices import find_device
from nibble.plan.presets import preset_config
from nibble.plan.simulate import Shape, simulate
from nibble.plan.tracker import MemoryTracker
from nibble.plan.watch import watch_build, watch_evaluation, watch_step
from nibble.train.build import storage_of

MEAN_LIMIT, WORST_LIMIT = 0.02, 0.05
CASES = [
    (model, method, recompute, length)
    for model in ("llama-3.2-1b", "llama-2-7b", "llama-3.1-8b", "llama-2-70b")
    for method, recompute in (
        ("lora", "none"),
        ("lora", "full"),
        ("qlora", "none"),
        ("qlora", "full"),
    )
    for length in (2048,)
]
TINY = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 128, "intermediate_size": 352,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    is_dry = arguments.dry_run or not torch.cuda.is_available()
    device = find_device("cpu" if is_dry else "here")
    lines = [
        "| model | method | recompute | tokens | predicted GB | allocated GB | off | reserved GB |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    offs = []
    for model, method, recompute, length in CASES:
        values = TINY if is_dry else preset_config(model)
        run = load_config(
            None, [f"method={method}", f"train.recompute={recompute}", "optim.paged=false"]
        )
        shape = Shape(((length,),), (length,))
        predicted = simulate(run, values, shape, device=device.type).peak.bytes
        extra = 0 if is_dry else workspace_bytes(device)
        if predicted + extra > budget_bytes(device):
            print(f"{model} {method} {recompute}: left out, {predicted / 1e9:.1f} GB do not fit")
            continue
        allocated, reserved = measure(run, values, shape, torch.device("cpu" if is_dry else "cuda"))
        offs.append((predicted + extra) / allocated - 1)
        lines.append(
            f"| {model} | {method} | {recompute} | {length} | {(predicted + extra) / 1e9:.3f} "
            f"| {allocated / 1e9:.3f} | {offs[-1]:+.2%} | {reserved / 1e9:.3f} |"
        )
        print(lines[-1], flush=True)
    average, worst = mean(map(abs, offs)), max(map(abs, offs))
    print(
        f"mean {average:.2%} (limit {MEAN_LIMIT:.0%}), worst {worst:.2%} (limit {WORST_LIMIT:.0%})"
    )
    if arguments.write:
        write_results(lines, device.name)
    return 0 if average <= MEAN_LIMIT and worst <= WORST_LIMIT else 1


def measure(run: Any, values: dict, shape: Shape, device: torch.device) -> tuple[int, int]:
    """Peak bytes that one step allocates, and that the allocator reserves."""
    is_cuda = device.type == "cuda"
    quantize(torch.ones(64))  # tables that are made once a process
    if is_cuda:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with fresh_scratch() as buffers, MemoryTracker() as tracker:
        tracker.begin("load")
        model = random_model(run, values, device)
        optimizer = watch_build(model, run, tracker)
        *batches, held_out = (
            random_batch(sum(documents), device)
            for documents in (*shape.micro_batches, shape.eval_documents)
        )
        watch_step(model, optimizer, run, batches, tracker, buffers)
        watch_evaluation(model, run, held_out, tracker, buffers)
    if is_cuda:
        return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    peak = max(peak.bytes for peak in tracker.peaks.values())
    return peak, peak


def random_model(run: Any, values: dict, device: torch.device) -> Any:
    """A base with random weights, each made on the device and placed as a loaded one."""
    storage = storage_of(run)
    model = build_skeleton(build_config(values), storage.dtype)
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    placer, ties = Placer(model, storage, device), tied_names(model)
    for name, shape in shapes.items():
        if name not in ties:
            placer.place(name, 0.02 * torch.randn(shape, dtype=torch.bfloat16, device=device))
    placer.finish()
    return model


def random_batch(length: int, device: torch.device) -> Batch:
    """One document in which every token but the first is a target."""
    ids = torch.randint(0, 500, (1, length), device=device)
    labels, positions = ids.clone(), torch.arange(length, device=device)[None]
    labels[0, 0] = -100
    ends = torch.tensor([0, length], dtype=torch.int32)
    return Batch(ids, labels, positions, ends, length, length - 1, (0,))


def write_results(lines: list[str], name: str) -> None:
    text = (
        f"# Predicted against measured peak memory\n\nDevice: {name}, torch {torch.__version__}. "
        "Command: `python benchmarks/plan_accuracy.py --write`.\n\n" + "\n".join(lines) + "\n"
    )
    path = Path(__file__).parent / "results" / "plan_accuracy_cuda_202611.md"
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
