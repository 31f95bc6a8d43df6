"""Held-out loss of nibble against PEFT and bitsandbytes on the same work.

    python benchmarks/held_out_loss.py --shared ../shared --out runs/held-out

The peers' figures stand in ../shared/data/README.md: 80 steps of 16 rows, rows cut at 512 tokens,
no packing, rank 16, learning rate 4e-3 (3e-4 for full fine-tuning), one seed; ours are means over
the seeds that are asked for. Finished runs are
read, not repeated, so the script can be stopped and started again.
"""

import argparse
from pathlib import Path
from statistics import geometric_mean, mean

import nibble
from nibble.events import EvalEnd, read_events

PEERS = {
    "biomedical": {"lora": 3.6353, "qlora": 3.6394, "full": 3.6058},
    "legal": {"lora": 0.7187, "qlora": 0.6789, "full": 0.4307},
    "customer": {"lora": 0.5929, "qlora": 0.5938, "full": 0.4373},
    "code": {"lora": 3.1959, "qlora": 3.1846, "full": 2.986},
    "maths": {"lora": 3.5046, "qlora": 3.4992, "full": 3.3975},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--out", type=Path, default=Path("runs/held-out"))
    parser.add_argument("--sets", nargs="+", default=list(PEERS), choices=PEERS)
    parser.add_argument("--methods", nargs="+", default=["lora", "qlora", "full"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    arguments = parser.parse_args()
    after: dict[tuple[str, str], float] = {}
    print("| set | method | before | after, per seed | mean | peer | ratio |")
    print("|---|---|---|---|---|---|---|")
    for name in arguments.sets:
        for method in arguments.methods:
            runs = [train(arguments, name, method, seed) for seed in arguments.seeds]
            losses = [loss for _, loss in runs]
            after[name, method] = mean(losses)
            listed = ", ".join(f"{loss:.4f}" for loss in losses)
            print(
                f"| {name} | {method} | {runs[0][0]:.4f} | {listed} | {mean(losses):.4f} "
                f"| {PEERS[name][method]} | {mean(losses) / PEERS[name][method]:.4f} |",
                flush=True,
            )
    ratios = [loss / PEERS[name][method] for (name, method), loss in after.items()]
    print(f"\nAgainst the peers: geometric mean of {len(ratios)} ratios", end=" ")
    print(f"{geometric_mean(ratios):.4f}, worst {max(ratios):.4f}.")
    pairs = [after[s, "qlora"] / after[s, "lora"] for s in arguments.sets if (s, "lora") in after]
    print(f"QLoRA over LoRA: mean of {len(pairs)} sets {mean(pairs):.4f}, worst {max(pairs):.4f}.")


def train(arguments: argparse.Namespace, name: str, method: str, seed: int) -> tuple[float, float]:
    """Held-out loss before and after one run."""
    data = arguments.shared / "data" / name
    run = nibble.load_config(
        None,
        [
            f"model.name={arguments.shared / 'models' / 'base-16m'}",
            f"data.train={data / 'train.jsonl'}",
            f"data.eval={data / 'eval.jsonl'}",
            f"method={method}",
            f"out={arguments.out / f'{name}-{method}-{seed}'}",
            f"train.seed={seed}",
            "train.steps=80",
            "train.batch_size=16",
            "data.packing=false",
            "data.max_seq_len=512",
            f"optim.lr={3e-4 if method == 'full' else 4e-3}",
        ],
    )
    result = nibble.train(run)
    losses = [e.loss for e in read_events(result.out / "events.jsonl") if isinstance(e, EvalEnd)]
    return losses[0], losses[-1]


if __name__ == "__main__":
    main()
