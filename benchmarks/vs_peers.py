"""Tokens per second and peak memory beside the peers, on the same work in one run.

    python benchmarks/vs_peers.py                    8 layers of width 1,024, 512 and 2,048 tokens
    python benchmarks/vs_peers.py --tokens 512 --rounds 9 --write
    python benchmarks/vs_peers.py --layers 32 --width 4096 --intermediate 14336 --heads 32 \\
        --kv-heads 8 --vocabulary 128256 --tokens 2048 8192       an 8B, on one GPU

Every contender trains the same random-weight Llama with adapters of rank 16 on all linear layers,
one document a step, every token a target, in bf16 with float32 adapters. Steps of all contenders
are taken in turn; medians are compared. On a GPU, which does not hold them all, each contender
takes its steps alone, twice, the second time in reverse order. Peak memory is that of the process
above what it held before the model was loaded, each contender in a process of its own; on a GPU
that of its tensors.

Peers as a careful user would run them: PEFT under autocast, AdamW in one kernel, Unsloth where it
is installed and there is a GPU; with and without gradient checkpointing. Install them with
`pip install -r benchmarks/peers-requirements.txt`.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from recording import machine, write_results
from shapes import DEVICE, Shape, make_folder
from transformers.utils import logging as transformers_logging

import nibble
from nibble.data.loader import Batch
from nibble.kernels.library import paths
from nibble.kernels.products import cpu_product_dtype
from nibble.model.load import load_base
from nibble.train.build import base_options, equip
from nibble.train.loss import token_loss
from nibble.train.memory import PeakMemory
from nibble.train.step import train_step

# The bars of loading say nothing here.
transformers_logging.disable_progress_bar()
Step = Callable[[], float]
Contender = tuple[str, str, str]
"""Name, method, recompute."""
Timed = dict[Contender, list[tuple[float, float]]]
METHODS, WAYS = ("lora", "qlora"), ("none", "full")
WARM_UP = 2
RANK, ALPHA, LEARNING_RATE = 16, 32, 2e-4


def make_nibble(method: str, recompute: str, folder: Path, tokens: int) -> Step:
    """Our own step, as `nibble train` takes it."""
    run = nibble.load_config(
        None,
        [
            f"model.name={json.dumps(str(folder))}", f"method={method}", f"lora.rank={RANK}",
            f"lora.alpha={ALPHA}", f"train.recompute={recompute}", "optim.paged=false",
        ],
    )  # fmt: skip
    model, _ = load_base(run.model.name, device=torch.device(DEVICE), **base_options(run))
    optimizer = equip(model, run)
    model.train()
    ids = token_ids(tokens, model.config.vocab_size)
    batch = Batch(
        input_ids=ids,
        labels=ids,
        position_ids=torch.arange(tokens)[None],
        cu_seq_lens=torch.tensor([0, tokens], dtype=torch.int32),
        max_doc_len=tokens,
        num_target_tokens=tokens - 1,
        row_ids=(0,),
    ).to(torch.device(DEVICE))

    def step() -> float:
        result = train_step(
            lambda b: token_loss(model, b), [batch], optimizer, lr=LEARNING_RATE, max_grad_norm=1.0
        )
        return result.loss

    return step


def make_peft(method: str, recompute: str, folder: Path, tokens: int) -> Step:
    """PEFT's step; with method "qlora" on a base that bitsandbytes holds in 4 bits."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = None
    if method == "qlora":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    base = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=quantization, device_map=DEVICE
    )
    base.config.use_cache = False
    if recompute == "full":
        base.gradient_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config).train()
    return peer_step(model, base.config.vocab_size, tokens)


def peer_step(model: Any, vocabulary: int, tokens: int) -> Step:
    """A step of a transformers model with adapters."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    ids = token_ids(tokens, vocabulary).to(DEVICE)

    def step() -> float:
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def token_ids(tokens: int, vocabulary: int) -> torch.Tensor:
    """The same tokens for everybody, (1, T)."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(vocabulary, (1, tokens), generator=generator)


def make_unsloth(method: str, recompute: str, folder: Path, tokens: int) -> Step:
    """Unsloth's step, with its own checkpointing where that is asked for."""
    from unsloth import FastLanguageModel  # pyright: ignore[reportMissingImports]

    base, _ = FastLanguageModel.from_pretrained(
        str(folder),
        max_seq_length=tokens,
        dtype=torch.bfloat16,
        load_in_4bit=method == "qlora",
    )
    model = FastLanguageModel.get_peft_model(
        base,
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0,
        use_gradient_checkpointing="unsloth" if recompute == "full" else False,
    )
    return peer_step(model.train(), base.config.vocab_size, tokens)


MAKERS = {"nibble": make_nibble, "peft": make_peft, "unsloth": make_unsloth}


def make(contender: Contender, tokens: int, folder: Path) -> Step:
    """A contender's step, its model loaded."""
    name, method, recompute = contender
    return MAKERS[name](method, recompute, folder, tokens)


def contenders(methods: list[str]) -> list[Contender]:
    """Everybody who can take part here."""
    has_unsloth = DEVICE == "cuda" and find_spec("unsloth") is not None
    names = [name for name in MAKERS if name != "unsloth" or has_unsloth]
    return [(name, method, way) for method in methods for name in names for way in WAYS]


@dataclass
class Measured:
    """What one contender did with one number of tokens."""

    name: str
    method: str
    recompute: str
    tokens: int
    seconds: float
    loss: float
    peak_bytes: int


def measure(who: list[Contender], rounds: int, tokens: int, folder: Path) -> list[Measured]:
    """Median step of every contender, and its peak memory."""
    timed = (in_turn if DEVICE == "cpu" else alone)(who, rounds, tokens, folder)
    gc.collect()
    return [
        Measured(
            *contender,
            tokens=tokens,
            seconds=statistics.median(seconds for seconds, _ in steps),
            loss=steps[-1][1],
            peak_bytes=_peak_of(contender, tokens, folder),
        )
        for contender, steps in timed.items()
    ]


def in_turn(who: list[Contender], rounds: int, tokens: int, folder: Path) -> Timed:
    """Seconds and loss of steps that all contenders take one after the other."""
    steps = {contender: make(contender, tokens, folder) for contender in who}
    turns = [{c: timed_step(step) for c, step in steps.items()} for _ in range(rounds + 1)]
    return {c: [turn[c] for turn in turns[1:]] for c in who}  # the first turn warms up


def alone(who: list[Contender], rounds: int, tokens: int, folder: Path) -> Timed:
    """The same where one model at a time fits: all of them twice, the second time backwards."""
    found: Timed = {contender: [] for contender in who}
    for contender in [*who, *reversed(who)]:
        step = make(contender, tokens, folder)
        found[contender] += [timed_step(step) for _ in range(rounds + WARM_UP)][WARM_UP:]
        del step
        gc.collect()
        torch.cuda.empty_cache()
    return found


def timed_step(step: Step) -> tuple[float, float]:
    """Seconds and loss."""
    synchronize()
    start = time.perf_counter()
    loss = step()
    synchronize()
    return time.perf_counter() - start, loss


def synchronize() -> None:
    """Wait for the device."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def _peak_of(contender: Contender, tokens: int, folder: Path) -> int:
    """Peak memory of three steps, in a process of its own."""
    words = [sys.executable, __file__, "--peak-of", ",".join(contender), "--tokens", str(tokens)]
    words += ["--folder", str(folder)]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1])


def print_peak(contender: Contender, tokens: int, folder: Path) -> None:
    """What `_peak_of` runs."""
    import peft  # noqa: F401  before the base line: everybody pays for the imports
    import transformers  # noqa: F401

    peak = PeakMemory(torch.device(DEVICE))
    step = make(contender, tokens, folder)
    for _ in range(3):
        step()
    print(peak.bytes())


def product_rate() -> float:
    """FLOP/s of a large product of the type that is fastest here, the best of five."""
    size = 8192 if DEVICE == "cuda" else 2048
    dtype = torch.bfloat16 if DEVICE == "cuda" else cpu_product_dtype()
    left, right = torch.randn(2, size, size, device=DEVICE, dtype=dtype)
    times = [timed_step(lambda: float((left @ right)[0, 0]))[0] for _ in range(6)]
    return 2 * size**3 / min(times)


def report(shape: Shape, found: list[Measured], rate: float) -> list[str]:
    """The table and the ratios, as lines of Markdown."""
    lines = [
        "| method | tokens | contender | recompute | tokens/s | ms a step | share of the roofline "
        "| peak memory, MiB | loss |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for m in sorted(found, key=lambda m: (m.method, m.tokens, m.seconds)):
        share = shape.step_flops(m.tokens) / rate / m.seconds
        lines.append(
            f"| {m.method} | {m.tokens:,} | {m.name} | {m.recompute} | {m.tokens / m.seconds:,.0f} "
            f"| {1000 * m.seconds:,.0f} | {share:.0%} | {m.peak_bytes / 2**20:,.0f} "
            f"| {m.loss:.4f} |"
        )
    lines += ["", "| method | tokens | faster than the fastest peer | memory of the leanest peer |"]
    lines.append("|---|---|---|---|")
    for method in sorted({m.method for m in found}):
        for tokens in sorted({m.tokens for m in found}):
            here = [m for m in found if (m.method, m.tokens) == (method, tokens)]
            ours, theirs = (
                [m for m in here if (m.name == "nibble") == own] for own in (True, False)
            )
            faster = min(m.seconds for m in theirs) / min(m.seconds for m in ours)
            leaner = min(m.peak_bytes for m in ours) / min(m.peak_bytes for m in theirs)
            lines.append(f"| {method} | {tokens:,} | {faster:.2f}x | {leaner:.2f}x |")
    for tokens in sorted({m.tokens for m in found}):
        ours = {
            method: [
                m.seconds
                for m in found
                if (m.name, m.method, m.tokens) == ("nibble", method, tokens)
            ]
            for method in METHODS
        }
        if all(ours.values()):
            ratio = min(ours["qlora"]) / min(ours["lora"])
            lines.append(f"\nOur QLoRA takes {ratio:.3f} of our LoRA's time at {tokens:,} tokens.")
    return lines


def main() -> None:
    """Measure, print, and write with --write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    for field, default in asdict(Shape()).items():
        parser.add_argument(f"--{field.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--write", action="store_true", help="Put the table into results/.")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak_of:
        name, method, recompute = options.peak_of.split(",")
        print_peak((name, method, recompute), options.tokens[0], options.folder)
        return
    shape = Shape(**{field: getattr(options, field) for field in asdict(Shape())})
    who = contenders(options.methods)
    with tempfile.TemporaryDirectory() as folder:
        make_folder(shape, Path(folder))
        found = []
        for tokens in options.tokens:
            found += measure(who, options.rounds, tokens, Path(folder))
    rate = product_rate()
    named = {"unsloth"} & {name for name, _, _ in who}
    peers = ", ".join(
        f"{name} {version(name)}" for name in ("transformers", "peft", "bitsandbytes", *named)
    )
    ways = "; ".join(f"{what}: {path}" for what, path in paths(torch.device(DEVICE)).items())
    lines = [
        f"# {shape.layers} layers of width {shape.width}, vocabulary {shape.vocabulary:,}, "
        f"adapters of rank {RANK}",
        "",
        f"Device: {machine(DEVICE)}, {torch.get_num_threads()} thread(s), "
        f"{rate / 1e9:,.0f} GFLOP/s in a large product. Ours: {ways}. "
        f"torch {torch.__version__}, {peers}. Medians of {options.rounds} rounds.",
        "",
        *report(shape, found, rate),
    ]
    print("\n".join(lines))
    if options.write:
        write_results("vs_peers", lines, DEVICE)


if __name__ == "__main__":
    main()
