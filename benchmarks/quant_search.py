"""What block scales of least squared error change: in the weights, in the base, after tuning.

    python benchmarks/quant_search.py --shared ../shared --out runs/quant-search [--write]

For each of five sets: held-out loss of the base in bfloat16, in NF4 and in NF4 with searched
scales, how far its predictions then lie from those in bfloat16 (KL divergence in nats per token of
the first held-out rows), and the held-out loss after a short QLoRA run on each of the two, with the
same seeds. Finished runs are read, not repeated, so the script can be stopped and started again.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from recording import machine, write_results
from torch import Tensor

import nibble
from nibble.data.dataset import build_dataset
from nibble.data.loader import eval_batches
from nibble.events import EvalEnd, read_events
from nibble.kernels import nf4
from nibble.train.evaluate import EVAL_TOKENS, evaluate

SETS = ("biomedical", "legal", "customer", "code", "maths")
BASES: dict[str, dict[str, Any]] = {
    "bf16": {"storage": "bf16"},
    "nf4": {"storage": "nf4"},
    "searched": {"storage": "nf4", "quant": {"search": True}},
}
NUM_ROWS_OF_KL = 40
BATCH_SIZE, MAX_LENGTH, LEARNING_RATE = 16, 512, 4e-3
WEIGHT_SHAPE, ROUNDS = (4096, 1024), 3


def main() -> None:
    """Measure, print, and write with --write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--out", type=Path, default=Path("runs/quant-search"))
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--write", action="store_true", help="Put the tables into results/.")
    options = parser.parse_args()
    lines = [
        "# Block scales of least squared error in NF4",
        "",
        f"Device: {machine()}, {torch.get_num_threads()} thread(s); {nf4.implementation()}. "
        f"torch {torch.__version__}. Model base-16m; {options.steps} steps of {BATCH_SIZE} rows, "
        f"cut at {MAX_LENGTH} tokens, learning rate {LEARNING_RATE}, seeds {options.seeds}.",
        "",
        *weights(),
        "",
        *bases(options),
        "",
        *tuned(options),
    ]
    print("\n".join(lines))
    if options.write:
        write_results("quant_search", lines)


def weights() -> list[str]:
    """Error and speed on Gaussian weights, and the time to load the model."""
    weight = torch.randn(WEIGHT_SHAPE, generator=torch.Generator().manual_seed(0)).bfloat16()
    lines = ["| Gaussian weight | scales | relative RMS error | M values/s |", "|---|---|---|---|"]
    for name, double in (("8-bit scales", True), ("float32 scales", False)):
        for search in (False, True):
            q = nf4.quantize(weight, double=double, search=search)
            rest = nf4.dequantize(q, dtype=torch.float32) - weight.float()
            error = (rest.double().norm() / weight.double().norm()).item()
            spent = fastest_seconds(
                lambda d=double, s=search: nf4.quantize(weight, double=d, search=s)
            )
            kind = "searched" if search else "largest magnitude"
            lines.append(f"| {name} | {kind} | {error:.3%} | {weight.numel() / spent / 1e6:.0f} |")
    return lines


def bases(options: argparse.Namespace) -> list[str]:
    """What each storage does to the untouched base."""
    model = str(options.shared / "models" / "base-16m")
    loaded = {name: nibble.load_base(model, **how) for name, how in BASES.items()}
    load_s = {
        name: fastest_seconds(lambda how=how: nibble.load_base(model, **how))
        for name, how in BASES.items()
    }
    lines = [
        f"Loading base-16m: {', '.join(f'{name} {s:.2f} s' for name, s in load_s.items())}.",
        "",
        "| set | loss in bf16 | nf4 | searched | KL from bf16: nf4 | searched |",
        "|---|---|---|---|---|---|",
    ]
    for name in options.sets:
        tokenizer = loaded["bf16"][1]
        run = config(options, name, search=False, seed=0)
        section = run.data.model_copy(update={"train": run.data.eval, "eval": None})
        rows = build_dataset(section, tokenizer, seed=0).train
        losses = [
            evaluate(base, eval_batches(rows, max_tokens=EVAL_TOKENS)).loss
            for base, _ in loaded.values()
        ]
        base_16bit, *others = (base for base, _ in loaded.values())
        ids = [torch.tensor(row.input_ids[:MAX_LENGTH])[None] for row in rows[:NUM_ROWS_OF_KL]]
        far = [mean(divergence(base_16bit, other, row) for row in ids) for other in others]
        lines.append(
            f"| {name} | {' | '.join(f'{loss:.4f}' for loss in losses)} "
            f"| {' | '.join(f'{kl:.5f}' for kl in far)} |"
        )
        print(lines[-1], flush=True)
    return lines


@torch.no_grad()
def divergence(base_16bit: Any, other: Any, input_ids: Tensor) -> float:
    """Mean over the positions of a row of KL(16-bit || other), in nats."""
    log_p, log_q = (
        model(input_ids=input_ids).logits.double().log_softmax(-1) for model in (base_16bit, other)
    )
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


def tuned(options: argparse.Namespace) -> list[str]:
    """Held-out loss after QLoRA on the plain and on the searched base, seed by seed."""
    lines = [
        "| set | nf4, per seed | searched, per seed | mean difference | its standard error |",
        "|---|---|---|---|---|",
    ]
    for name in options.sets:
        losses = {
            search: [train(options, name, search=search, seed=seed) for seed in options.seeds]
            for search in (False, True)
        }
        pairs = zip(losses[True], losses[False], strict=True)
        changes = [searched - plain for searched, plain in pairs]
        doubt = stdev(changes) / len(changes) ** 0.5 if len(changes) > 1 else float("nan")
        per_seed = (", ".join(f"{loss:.4f}" for loss in losses[s]) for s in (False, True))
        lines.append(f"| {name} | {' | '.join(per_seed)} | {mean(changes):+.4f} | {doubt:.4f} |")
        print(lines[-1], flush=True)
    return lines


def train(options: argparse.Namespace, name: str, *, search: bool, seed: int) -> float:
    """Held-out loss after one run."""
    result = nibble.train(config(options, name, search=search, seed=seed))
    events = read_events(result.out / "events.jsonl")
    return [event.loss for event in events if isinstance(event, EvalEnd)][-1]


def config(options: argparse.Namespace, name: str, *, search: bool, seed: int) -> nibble.RunConfig:
    """One QLoRA run."""
    data = options.shared / "data" / name
    kind = "searched" if search else "plain"
    return nibble.load_config(
        None,
        [
            f"model.name={options.shared / 'models' / 'base-16m'}",
            f"data.train={data / 'train.jsonl'}",
            f"data.eval={data / 'eval.jsonl'}",
            "method=qlora",
            f"quant.search={'true' if search else 'false'}",
            f"out={options.out / f'{name}-{kind}-{options.steps}-{seed}'}",
            f"train.seed={seed}",
            f"train.steps={options.steps}",
            f"train.batch_size={BATCH_SIZE}",
            "data.packing=false",
            f"data.max_seq_len={MAX_LENGTH}",
            f"optim.lr={LEARNING_RATE}",
        ],
    )


def fastest_seconds(work: Callable[[], object]) -> float:
    """The shortest of some rounds."""
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


if __name__ == "__main__":
    main()
