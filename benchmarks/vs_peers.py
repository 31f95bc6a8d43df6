"""Tokens per second and peak memory beside the peers, on the same work in one run.

    python benchmarks/vs_peers.py                    8 layers of width 1,024, 512 and 2,048 tokens
    python benchmarks/vs_peers.py --tokens 512 --rounds 9 --write

Every contender trains the same random-weight Llama with adapters of rank 16 on all linear layers,
one document a step, every token a target, in bf16 with float32 adapters. Steps of all contenders
are taken in turn; medians are compared. Peak memory is that of the process above what it held
before the model was loaded, each contender in a process of its own.

Peers as a careful user would run them: PEFT under autocast, AdamW in one kernel; with and without
gradient checkpointing. Install them with `pip install -r benchmarks/peers-requirements.txt`.
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
from pathlib import Path

import torch
from recording import machine, write_results
from transformers.utils import logging as transformers_logging

import nibble
from nibble.data.loader import Batch
from nibble.kernels.nf4 import implementation
from nibble.model.load import load_base
from nibble.train.build import base_options, equip
from nibble.train.loss import token_loss
from nibble.train.memory import PeakMemory
from nibble.train.step import train_step

# The bars of loading say nothing here.
transformers_logging.disable_progress_bar()
Step = Callable[[], float]
RANK, ALPHA, LEARNING_RATE = 16, 32, 2e-4


@dataclass(frozen=True)
class Shape:
    """A Llama of random weights."""

    layers: int = 8
    width: int = 1024
    intermediate: int = 2816
    heads: int = 16
    kv_heads: int = 16
    vocabulary: int = 32000

    def linear_values(self) -> int:
        """Weights of the linear layers of the decoder."""
        head = self.width // self.heads
        attention = self.width * head * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.width * self.intermediate)

    def step_flops(self, tokens: int) -> float:
        """Least operations of a step without recomputation: 4PT, the head, causal attention."""
        head = 4 * tokens * self.width * self.vocabulary
        attention = 3.5 * 2 * tokens**2 * self.width * self.layers
        return 4 * self.linear_values() * tokens + head + attention


def make_folder(shape: Shape, folder: Path) -> None:
    """A checkpoint of random weights with a tokenizer of single words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=1 << 16,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    words = Tokenizer(WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="</s>"
    ).save_pretrained(folder)


def make_nibble(method: str, recompute: str, folder: Path, tokens: int, device: str) -> Step:
    """Our own step, as `nibble train` takes it."""
    run = nibble.load_config(
        None,
        [
            f"model.name={json.dumps(str(folder))}", f"method={method}", f"lora.rank={RANK}",
            f"lora.alpha={ALPHA}", f"train.recompute={recompute}", "optim.paged=false",
        ],
    )  # fmt: skip
    model, _ = load_base(run.model.name, device=torch.device(device), **base_options(run))
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
    ).to(torch.device(device))

    def step() -> float:
        result = train_step(
            lambda b: token_loss(model, b), [batch], optimizer, lr=LEARNING_RATE, max_grad_norm=1.0
        )
        return result.loss

    return step


def make_peft(method: str, recompute: str, folder: Path, tokens: int, device: str) -> Step:
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
        folder, dtype=torch.bfloat16, quantization_config=quantization, device_map=device
    )
    base.config.use_cache = False
    if recompute == "full":
        base.gradient_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    ids = token_ids(tokens, base.config.vocab_size).to(device)

    def step() -> float:
        with torch.autocast(device, torch.bfloat16):
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


MAKERS = {"nibble": make_nibble, "peft": make_peft}
CONTENDERS = [
    (name, method, recompute)
    for method in ("lora", "qlora")
    for name in MAKERS
    for recompute in ("none", "full")
]


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


def measure(shape: Shape, tokens: int, rounds: int, folder: Path, device: str) -> list[Measured]:
    """Median step of every contender, taken in turn, and its peak memory."""
    steps = [
        MAKERS[name](method, recompute, folder, tokens, device)
        for name, method, recompute in CONTENDERS
    ]
    seconds: list[list[float]] = [[] for _ in steps]
    losses = [0.0] * len(steps)
    for turn in range(rounds + 1):
        for index, step in enumerate(steps):
            start = time.perf_counter()
            losses[index] = step()
            if turn:  # the first one warms up
                seconds[index].append(time.perf_counter() - start)
    del steps
    gc.collect()
    return [
        Measured(
            *contender,
            tokens=tokens,
            seconds=statistics.median(times),
            loss=loss,
            peak_bytes=_peak_of(contender, tokens, folder, device),
        )
        for contender, times, loss in zip(CONTENDERS, seconds, losses, strict=True)
    ]


def _peak_of(contender: tuple[str, str, str], tokens: int, folder: Path, device: str) -> int:
    """Peak memory of three steps, in a process of its own."""
    words = [sys.executable, __file__, "--peak-of", ",".join(contender), "--tokens", str(tokens)]
    words += ["--folder", str(folder), "--device", device]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1])


def print_peak(contender: str, tokens: int, folder: Path, device: str) -> None:
    """What `_peak_of` runs."""
    import peft  # noqa: F401  before the base line: everybody pays for the imports
    import transformers  # noqa: F401

    name, method, recompute = contender.split(",")
    peak = PeakMemory(torch.device(device))
    step = MAKERS[name](method, recompute, folder, tokens, device)
    for _ in range(3):
        step()
    print(peak.bytes())


def product_rate(device: str) -> float:
    """FLOP/s of a large bf16 product here, the best of five."""
    left, right = torch.randn(2, 2048, 2048, device=device).bfloat16()
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - start)
    return 2 * 2048**3 / best


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
    for method in ("lora", "qlora"):
        for tokens in sorted({m.tokens for m in found}):
            here = [m for m in found if (m.method, m.tokens) == (method, tokens)]
            ours, theirs = (
                [m for m in here if (m.name == "nibble") == own] for own in (True, False)
            )
            faster = min(m.seconds for m in theirs) / min(m.seconds for m in ours)
            leaner = min(m.peak_bytes for m in ours) / min(m.peak_bytes for m in theirs)
            lines.append(f"| {method} | {tokens:,} | {faster:.2f}x | {leaner:.2f}x |")
    for tokens in sorted({m.tokens for m in found}):
        lora, qlora = (
            min(m.seconds for m in found if (m.name, m.method, m.tokens) == ("nibble", x, tokens))
            for x in ("lora", "qlora")
        )
        lines.append(
            f"\nOur QLoRA takes {qlora / lora:.3f} of our LoRA's time at {tokens:,} tokens."
        )
    return lines


def main() -> None:
    """Measure, print, and write with --write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for field, default in asdict(Shape()).items():
        parser.add_argument(f"--{field.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--write", action="store_true", help="Put the table into results/.")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak_of:
        print_peak(options.peak_of, options.tokens[0], options.folder, options.device)
        return
    shape = Shape(**{field: getattr(options, field) for field in asdict(Shape())})
    with tempfile.TemporaryDirectory() as folder:
        make_folder(shape, Path(folder))
        found = []
        for tokens in options.tokens:
            found += measure(shape, tokens, options.rounds, Path(folder), options.device)
    rate = product_rate(options.device)
    peers = ", ".join(
        f"{name} {version(name)}" for name in ("transformers", "peft", "bitsandbytes")
    )
    lines = [
        f"# {shape.layers} layers of width {shape.width}, vocabulary {shape.vocabulary:,}, "
        f"adapters of rank {RANK}",
        "",
        f"Device: {machine(options.device)}, {torch.get_num_threads()} thread(s), "
        f"{rate / 1e9:,.0f} GFLOP/s in a large bf16 product; 4-bit code: "
        f"{implementation(options.device)}. torch {torch.__version__}, {peers}. Medians of "
        f"{options.rounds} interleaved rounds.",
        "",
        *report(shape, found, rate),
    ]
    print("\n".join(lines))
    if options.write:
        write_results("vs_peers", lines, options.device)


if __name__ == "__main__":
    main()
