"""A whole run beside TRL's SFTTrainer: from the start of the program to the saved adapter.

    python benchmarks/vs_trl.py --shared ../shared                  five sets, LoRA
    python benchmarks/vs_trl.py --sets legal --methods lora qlora --tokens 100000

Both train `base-16m` on the same conversations for the same epochs: 16 of them a step, cut at 512
tokens, loss on the answers, rank 16 on all linear layers, the same schedule, in bf16 with float32
adapters. A short run is far from its lowest loss, and a step more or less shows: give several
learning rates, and compare everybody's best. Each run is a process of its own; runs of the
contenders follow each other, set by set. Held-out loss is measured afterwards, for every adapter by
the same code.

TRL runs at its defaults, tuned (nothing computed again, rows of like length together) and packed,
these two in bf16 and in float32. It reads conversations that are converted beforehand. Install it
with `pip install -r benchmarks/peers-requirements.txt`.
"""

import argparse
import bisect
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from itertools import accumulate, product
from pathlib import Path
from typing import Any

from recording import machine, write_results

from nibble.experiment.statistics import estimate

SETS = ("biomedical", "code", "customer", "legal", "maths")
BATCH_SIZE, MAX_LENGTH, WARMUP = 16, 512, 0.03
RANK, ALPHA = 16, 32
_TUNED = {"gradient_checkpointing": False, "train_sampling_strategy": "group_by_length"}
_PACKED = {"gradient_checkpointing": False, "packing": True, "per_device_train_batch_size": 1}
# What each TRL contender sets beside what all share. Some CPUs multiply float32 faster.
TRL = {
    "TRL, defaults": {},
    "TRL, tuned": _TUNED,
    "TRL, tuned, float32": {**_TUNED, "bf16": False},
    "TRL, packed": _PACKED,
    "TRL, packed, float32": {**_PACKED, "bf16": False},
}


@dataclass(frozen=True)
class Work:
    """What one contender is to do."""

    contender: str
    method: str
    model: str
    data: str
    out: str
    epochs: int
    seed: int
    learning_rate: float
    packed_rows: int
    packed_length: int


def train_nibble(work: Work) -> list[str]:
    """The command of our run; all that is not the work itself is left to nibble."""
    settings = [
        f"train.batch_size={BATCH_SIZE}", f"data.max_seq_len={MAX_LENGTH}", "data.packing=false",
        f"train.epochs={work.epochs}", f"optim.lr={work.learning_rate}", f"optim.warmup={WARMUP}",
        f"lora.rank={RANK}", f"lora.alpha={ALPHA}", f"train.seed={work.seed}",
    ]  # fmt: skip
    words = [sys.executable, "-m", "nibble", "train", "--model", work.model, "--data", work.data]
    words += ["--method", work.method, "--out", work.out]
    return [*words, *(word for setting in settings for word in ("--set", setting))]


def train_trl(work: Work) -> None:
    """TRL's run, from loading to the saved adapter."""
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    quantization = None
    if work.method == "qlora":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    model = AutoModelForCausalLM.from_pretrained(
        work.model,
        dtype=torch.bfloat16 if TRL[work.contender].get("bf16", True) else torch.float32,
        quantization_config=quantization,
    )
    model.config.use_cache = False
    shared = {
        "output_dir": work.out,
        "per_device_train_batch_size": BATCH_SIZE,
        "num_train_epochs": work.epochs,
        "learning_rate": work.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": WARMUP,
        "max_grad_norm": 1.0,
        "max_length": MAX_LENGTH,
        "seed": work.seed,
        "completion_only_loss": True,
        "bf16": True,
        "use_cpu": not torch.cuda.is_available(),
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    own = dict(TRL[work.contender])
    if own.get("packing"):
        own["gradient_accumulation_steps"] = work.packed_rows
        own["max_length"] = work.packed_length
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**{**shared, **own}),
        train_dataset=load_dataset("json", data_files=work.data, split="train"),
        processing_class=AutoTokenizer.from_pretrained(work.model),
        peft_config=LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    trainer.create_scheduler = partial(use_our_schedule, trainer)
    trainer.train()
    trainer.save_model(work.out)
    print(f"steps {trainer.state.global_step}")


def use_our_schedule(trainer: Any, num_training_steps: int, optimizer: Any = None) -> Any:
    """A warm-up whose first step moves, as ours does, and a cosine to 0."""
    from torch.optim.lr_scheduler import LambdaLR

    num_warmup = math.ceil(WARMUP * num_training_steps)

    def factor(step: int) -> float:
        if step < num_warmup:
            return (step + 1) / (num_warmup + 1)
        progress = (step - num_warmup) / max(1, num_training_steps - num_warmup)
        return 0.5 * (1 + math.cos(math.pi * progress))

    trainer.lr_scheduler = LambdaLR(optimizer or trainer.optimizer, factor)
    return trainer.lr_scheduler


def convert(lines: list[str], target: Path) -> Path:
    """The lines as they are, and beside them as TRL reads them.

    Returns:
        The path of TRL's: messages before the answer, and the answer.
    """
    from nibble.data.records import read_records

    target.write_text("".join(lines))
    converted = target.with_suffix(".trl.jsonl")
    with converted.open("w") as file:
        for conversation in read_records(target):
            messages = [{"role": m.role, "content": m.content} for m in conversation.messages]
            file.write(json.dumps({"prompt": messages[:-1], "completion": messages[-1:]}) + "\n")
    return converted


def run_process(words: list[str], log: Path) -> float:
    """Seconds of a process; what it says goes to a file."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
    start = time.perf_counter()
    with log.open("w") as file:
        subprocess.run(words, check=True, stdout=file, stderr=subprocess.STDOUT, env=environment)
    return time.perf_counter() - start


def held_out_loss(model: str, adapter: Path, data: Path, method: str) -> float:
    """The loss of any contender's adapter on held-out conversations."""
    words = [sys.executable, "-m", "nibble", "eval", "--model", model, "--adapter", str(adapter)]
    words += ["--data", str(data), "--json", "--method", method]
    words += ["--set", f"data.max_seq_len={MAX_LENGTH}"]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)["loss"]


def tokens_of(data: Path, model: str) -> list[int]:
    """Tokens of each conversation, cut as in training."""
    from transformers import AutoTokenizer
    from transformers.utils.logging import set_verbosity_error

    set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    texts = [
        tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False)
        for row in rows
    ]
    return [min(len(ids), MAX_LENGTH) for ids in tokenizer(texts)["input_ids"]]


def packed_sizes(tokens: list[int]) -> tuple[int, int]:
    """Packed rows a step and their length: together what a step of conversations holds."""
    tokens_a_step = BATCH_SIZE * statistics.mean(tokens)
    num_rows = max(1, int(tokens_a_step / MAX_LENGTH))
    return num_rows, max(MAX_LENGTH, math.ceil(tokens_a_step / num_rows))


def compare(options: argparse.Namespace, name: str, method: str, folder: Path) -> list[str]:
    """The lines of one set and method."""
    model, source = str(options.shared / "models" / "base-16m"), options.shared / "data" / name
    data = folder / f"{name}.jsonl"
    lines = (source / "train.jsonl").read_text().splitlines(keepends=True)
    random.Random(0).shuffle(lines)  # the sets are sorted by what they are about
    tokens = tokens_of(convert(lines, data), model)
    num_rows = bisect.bisect(list(accumulate(tokens)), options.tokens)
    converted = convert(lines[:num_rows], data)
    packed_rows, packed_length = packed_sizes(tokens[:num_rows])
    found: dict[tuple[str, float], list[tuple[float, float]]] = {}
    for seed, rate in product(range(options.seeds), options.rates):
        contenders = ["nibble", *options.contenders]
        for contender in contenders if seed % 2 == 0 else reversed(contenders):
            out = folder / f"{name}-{method}-{contender.replace(', ', '-')}-{rate}-{seed}"
            is_ours = contender == "nibble"
            work = Work(
                contender=contender,
                method=method,
                model=model,
                data=str(data if is_ours else converted),
                out=str(out),
                epochs=options.epochs,
                seed=seed,
                learning_rate=rate,
                packed_rows=packed_rows,
                packed_length=packed_length,
            )
            peer = [sys.executable, __file__, "--train-trl", json.dumps(asdict(work))]
            log = out.with_name(f"{out.name}.log")
            seconds = run_process(train_nibble(work) if is_ours else peer, log)
            adapter = out / "adapter" if is_ours else out
            loss = held_out_loss(model, adapter, source / "eval.jsonl", method)
            found.setdefault((contender, rate), []).append((seconds, loss))
            print(f"{name} {method} {contender} {rate}: {seconds:.1f} s, {loss:.4f}", flush=True)
    ours = {rate: [loss for _, loss in found["nibble", rate]] for rate in options.rates}
    medians = {run: statistics.median(s for s, _ in runs) for run, runs in found.items()}
    lines = []
    for contender, rate in product(("nibble", *options.contenders), options.rates):
        losses = [loss for _, loss in found[contender, rate]]
        median = medians[contender, rate]
        lines.append(
            f"| {name} | {method} | {contender} | {rate} | {median:.1f} "
            f"| {statistics.mean(losses):.4f} | {max(losses) - min(losses):.4f} "
            f"| {median / medians['nibble', rate]:.2f}x | {beside(ours[rate], losses)} |"
        )
    return lines


def beside(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Our losses over theirs in per cent, seed by seed: the mean and its 95 % interval."""
    ratios = [100 * (our / their - 1) for our, their in zip(ours, theirs, strict=True)]
    found = estimate(ratios)
    if found is None or found.half_width is None:
        return f"{ratios[0]:+.2f} %"
    return f"{found.value:+.2f} % ± {found.half_width:.2f}"


def main() -> None:
    """Measure, print, and write with --write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS)
    parser.add_argument("--methods", nargs="+", default=["lora"], choices=["lora", "qlora"])
    parser.add_argument("--contenders", nargs="+", default=list(TRL), choices=list(TRL))
    parser.add_argument("--tokens", type=int, default=60_000, help="Drawn of each set.")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", nargs="+", type=float, default=[4e-3], help="Learning rates.")
    parser.add_argument("--write", action="store_true", help="Put the table into results/.")
    parser.add_argument("--train-trl", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train_trl:
        train_trl(Work(**json.loads(options.train_trl)))
        return
    import torch

    names = ("transformers", "peft", "bitsandbytes", "trl", "accelerate")
    lines = [
        "# Whole runs on real conversations against TRL",
        "",
        f"Device: {machine()}, {torch.get_num_threads()} thread(s). torch {torch.__version__}, "
        f"{', '.join(f'{name} {version(name)}' for name in names)}. Of each set "
        f"{options.tokens:,} tokens, {options.epochs} epoch(s), "
        f"{BATCH_SIZE} conversations a step; seconds from the start of the program to the saved "
        f"adapter, the median of {options.seeds} seeds; the mean of their losses, and how far they "
        "lie apart; our losses over theirs, seed by seed, with the 95 % interval of the mean.",
        "",
        "| set | method | contender | rate | seconds | held-out loss | apart | we are faster by "
        "| our loss |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for method in options.methods:
            for name in options.sets:
                lines += compare(options, name, method, Path(folder))
    print("\n".join(lines))
    if options.write:
        write_results("vs_trl", lines)


if __name__ == "__main__":
    main()
