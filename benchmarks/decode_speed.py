"""Tokens a second of greedy decoding from a 4-bit base, beside transformers with bitsandbytes.

    OMP_NUM_THREADS=1 python benchmarks/decode_speed.py [--base FOLDER] [--write]

Both decode the same prompts of 32 tokens from the same weights (NF4, block 64, double
quantisation, bfloat16), in turn, in one process; medians of the rounds. The prompt is part of the
time. Then, with --base: 32 answers with four adapters, mixed in one batch and one at a time.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
import transformers
from recording import machine, write_results
from shapes import Shape, make_folder

from nibble.adapter.format import write_adapter
from nibble.adapter.many import Adapters
from nibble.kernels import few_rows_cpu
from nibble.model.adapt import adapt
from nibble.model.load import load_base
from nibble.serve.batch import Batch
from nibble.serve.sampling import Sampling

PROMPT_TOKENS = 32
NEW_TOKENS = 48
ROUNDS = 5
ADAPTERS = ("a", "b", "c", "d")
ANSWERS = 32


def load_peer(folder: Path) -> Any:
    """The model in transformers, its linear layers in bitsandbytes' 4 bits."""
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings, dtype=torch.bfloat16
    )
    return model.eval()


def peer_tokens(model: Any, ids: Sequence[int]) -> list[int]:
    """Its greedy answer."""
    inputs = torch.tensor([ids])
    output = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return output[0, len(ids) :].tolist()


def our_tokens(
    model: Any,
    tokenizer: Any,
    requests: Sequence[tuple[Sequence[int], str | None]],
    adapters: Adapters | None = None,
) -> list[list[int]]:
    """Our greedy answers to prompts, each with its adapter, made together."""
    batch = Batch(model, tokenizer, adapters, max_tokens=1 << 20)
    answers = [
        batch.add(ids, Sampling(max_new_tokens=NEW_TOKENS), adapter=name) for ids, name in requests
    ]
    tokens: dict[Any, list[int]] = {answer: [] for answer in answers}
    while batch.has_work():
        for piece in batch.step():
            if piece.token is not None:
                tokens[piece.sequence].append(piece.token)
    return [tokens[answer] for answer in answers]


Rates = tuple[float, float]


def timed(work: Callable[[], list[list[int]]]) -> tuple[Rates, list[list[int]]]:
    """Tokens a second and tokens a CPU second, and the tokens."""
    started = time.perf_counter(), time.process_time()
    answers = work()
    seconds = time.perf_counter() - started[0], time.process_time() - started[1]
    count = sum(map(len, answers))
    return (count / seconds[0], count / seconds[1]), answers


def medians(ours: Sequence[Rates], theirs: Sequence[Rates]) -> str:
    """Cells of a table: both rates, and the ratios of the rounds by the clock and by CPU time."""
    print(ours, theirs)
    cells = [f"{statistics.median(rate for rate, _ in rates):.1f}" for rates in (ours, theirs)]
    for kind in range(2):
        ratios = [a[kind] / b[kind] for a, b in zip(ours, theirs, strict=True)]
        cells.append(f"{statistics.median(ratios):.2f}x")
    return " | ".join(cells)


def draw_prompts(vocabulary: int, count: int) -> list[list[int]]:
    """Random tokens, none of them special."""
    source = random.Random(0)
    return [[source.randrange(16, vocabulary) for _ in range(PROMPT_TOKENS)] for _ in range(count)]


def same_start(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """The mean share of an answer before the first difference."""
    shares = []
    for a, b in zip(ours, theirs, strict=True):
        same = [x == y for x, y in zip(a, b, strict=False)]
        shares.append((same.index(False) if False in same else len(same)) / max(1, len(a)))
    return statistics.mean(shares)


def compare(title: str, folder: Path) -> str:
    """A line of the first table."""
    model, tokenizer = load_base(str(folder), "nf4")
    peer = load_peer(folder)
    # No end of the answer: both make as many tokens.
    model.generation_config.eos_token_id = tokenizer.eos_token = None
    prompts = draw_prompts(model.config.vocab_size, 3)
    requests = [[(ids, None)] for ids in prompts]
    rates: tuple[list[Rates], list[Rates]] = ([], [])
    for number in range(ROUNDS + 1):
        ours, our_answers = timed(
            lambda: [our_tokens(model, tokenizer, each)[0] for each in requests]
        )
        theirs, their_answers = timed(lambda: [peer_tokens(peer, ids) for ids in prompts])
        if number:  # the first warms up
            rates[0].append(ours)
            rates[1].append(theirs)
    return f"| {title} | {medians(*rates)} | {same_start(our_answers, their_answers):.0%} |"


def compare_batch(folder: Path) -> list[str]:
    """The lines of the second table."""
    model, tokenizer = load_base(str(folder), "nf4")
    adapters = Adapters(model)
    with tempfile.TemporaryDirectory() as place:
        for number, name in enumerate(ADAPTERS):
            adapters.load(name, make_adapter(folder, Path(place) / name, number))
    prompts = draw_prompts(model.config.vocab_size, ANSWERS)
    requests = [(ids, ADAPTERS[n % len(ADAPTERS)]) for n, ids in enumerate(prompts)]
    rates: tuple[list[Rates], list[Rates]] = ([], [])
    for number in range(ROUNDS + 1):
        together, answers = timed(lambda: our_tokens(model, tokenizer, requests, adapters))
        alone, each_alone = timed(
            lambda: [our_tokens(model, tokenizer, [each], adapters)[0] for each in requests]
        )
        assert answers == each_alone, "an answer depends on the batch"
        if number:
            rates[0].append(together)
            rates[1].append(alone)
    return [f"| {medians(*rates)} |"]


def make_adapter(base: Path, folder: Path, seed: int) -> Path:
    """An adapter of rank 16 on all linear layers, with small random factors."""
    model, _ = load_base(str(base), "bf16")
    generator = torch.Generator().manual_seed(seed)
    adapt(model, rank=16, alpha=32, generator=generator)
    with torch.no_grad():
        for name, factor in model.named_parameters():
            if name.endswith("lora_B"):
                factor.normal_(0, 0.02, generator=generator)
    return write_adapter(model, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, help="a folder with trained weights, such as base-16m")
    parser.add_argument("--write", action="store_true", help="also write benchmarks/results/")
    arguments = parser.parse_args()
    shape = Shape()
    with tempfile.TemporaryDirectory() as place:
        make_folder(shape, Path(place))
        title = f"random weights, width {shape.width:,}, {shape.layers} layers, "
        rows = [compare(f"{title}vocabulary {shape.vocabulary:,}", Path(place))]
    more: list[str] = []
    if arguments.base is not None:
        rows.append(compare(arguments.base.name, arguments.base))
        more = [
            "",
            f"{ANSWERS} answers of {arguments.base.name} with {len(ADAPTERS)} adapters of rank 16, "
            "mixed; every answer has the same tokens both ways.",
            "",
            "| in one batch, tokens/s | one at a time, tokens/s | faster | faster by CPU time |",
            "|---|---|---|---|",
            *compare_batch(arguments.base),
        ]
    lines = [
        "# Greedy decoding from a 4-bit base on a CPU",
        "",
        f"Device: {machine()}, {torch.get_num_threads()} thread(s). torch {torch.__version__}, "
        f"transformers {transformers.__version__}, bitsandbytes {bitsandbytes.__version__}. "
        f"Few rows: {few_rows_cpu.implementation()}. Prompts of {PROMPT_TOKENS} tokens, "
        f"answers of {NEW_TOKENS}, medians of {ROUNDS} rounds in turn.",
        "",
        "| model | nibble, tokens/s | bitsandbytes, tokens/s | faster | faster by CPU time | "
        "same tokens |",
        "|---|---|---|---|---|---|",
        *rows,
        *more,
    ]
    print("\n".join(lines))
    if arguments.write:
        write_results("decode", lines)


if __name__ == "__main__":
    main()
