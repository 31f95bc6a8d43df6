"""What exactness and checkpoints cost.

    python benchmarks/reliability.py --shared ../shared --write

1. The time of a step with train.exactness=exact against the default: runs in turns.
2. The share of its wall time that a run spent on saving.
3. The time to save and to restore, by the size of the model whose adapter is trained at rank 16,
   and its share of the default interval.
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from recording import machine, write_results
from torch import nn

import nibble
from nibble.config import RunConfig, interval_seconds
from nibble.events import CheckpointSaved, RunEnd, StepEnd, read_events
from nibble.train.checkpoint import TrainState, latest, restore, save
from nibble.train.optimizer import AdamW, ParameterGroup

NUM_TRAINED = {"1B": 11_272_192, "8B": 41_943_040}
NUM_SKIPPED = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=23)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lines = [
            "# What exactness and checkpoints cost",
            "",
            f"Machine: {machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}.",
            "",
            *exactness_lines(arguments, Path(folder)),
            "",
            *checkpoint_lines(Path(folder)),
        ]
    print("\n".join(lines))
    if arguments.write:
        write_results("reliability", lines)


def exactness_lines(arguments: argparse.Namespace, folder: Path) -> list[str]:
    """Milliseconds a step of either level, their ratio, and the share of saving."""
    lines = ["| method | default ms | exact ms | ratio | saves | share of time |", "|---" * 6 + "|"]
    for method in ("lora", "qlora"):
        seconds: dict[str, list[float]] = {"default": [], "exact": []}
        saves, wall = [], 0.0
        for number in range(arguments.rounds):
            for level, all_seconds in seconds.items():
                out = folder / f"{method}-{level}-{number}"
                started = time.monotonic()
                train(arguments, method, level, out)
                wall += time.monotonic() - started
                events = list(read_events(out / "events.jsonl"))
                steps = [e.seconds for e in events if isinstance(e, StepEnd)]
                all_seconds.append(median(steps[NUM_SKIPPED:]))
                saves += [e.seconds for e in events if isinstance(e, CheckpointSaved)]
                assert isinstance(events[-1], RunEnd)
        default, exact = (1000 * median(seconds[level]) for level in ("default", "exact"))
        ratio = median(b / a for a, b in zip(seconds["default"], seconds["exact"], strict=True))
        lines.append(
            f"| {method} | {default:.0f} | {exact:.0f} | {ratio:.3f} | {len(saves)} "
            f"| {sum(saves) / wall:.2%} |"
        )
    return lines


def train(arguments: argparse.Namespace, method: str, level: str, out: Path) -> None:
    """One run of the small model on customer service rows, evaluated and saved at its middle."""
    data = arguments.shared / "data" / "customer"
    settings = [
        f"model.name={arguments.shared / 'models' / 'base-16m'}",
        f"data.train={data / 'train.jsonl'}",
        "data.eval=0.005",
        f"method={method}",
        f"out={out}",
        f"train.exactness={level}",
        f"train.steps={arguments.steps}",
        f"train.eval_every={arguments.steps // 2}",
        "train.batch_size=8",
        "train.micro_batch_size=4",
        "train.recompute=none",
        "data.max_seq_len=256",
        "lora.dropout=0.05",
    ]
    nibble.train(nibble.load_config(None, settings))


def checkpoint_lines(folder: Path) -> list[str]:
    """Seconds of a save and of a restore, and the share of the default interval."""
    interval = interval_seconds(RunConfig().train.save_every, "train.save_every")
    lines = [
        f"The default interval is {interval:.0f} s.",
        "",
        "| base | trained | on disk | save s | share of interval | find and restore s |",
        "|---" * 6 + "|",
    ]
    for name, count in NUM_TRAINED.items():
        generator = torch.Generator().manual_seed(0)
        values = nn.Parameter(torch.randn(count, generator=generator))
        optimizer = AdamW([ParameterGroup((values,))])
        out, saving, restoring = folder / name, [], []
        for step in range(1, 6):
            started = time.monotonic()
            save(out, TrainState(step), optimizer, identity={})
            saved = time.monotonic()
            found, _ = latest(out)
            assert found is not None
            restore(found, optimizer)
            saving.append(saved - started)
            restoring.append(time.monotonic() - saved)
        num_bytes = sum(path.stat().st_size for path in found.path.iterdir())
        lines.append(
            f"| {name} | {count:,} | {num_bytes / 2**20:,.0f} MiB | {median(saving):.2f} "
            f"| {median(saving) / interval:.3%} | {median(restoring):.2f} |"
        )
    return lines


if __name__ == "__main__":
    main()
