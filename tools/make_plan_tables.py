"""Two tables for docs/planning.md: what the planner decides, and published figures beside it.

python tools/make_plan_tables.py            prints them
python tools/make_plan_tables.py --write    puts them between their markers in docs/planning.md
"""

import argparse
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import nibble
from nibble.plan.budget import CONTEXT_BYTES
from nibble.plan.plan import Plan, make_plan
from nibble.plan.watch import BASE_4BIT, BASE_DENSE, EMBEDDINGS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "planning.md"
GIB = 2**30

DECISIONS = {
    "llama-3.2-1b": (8, 24, 80),
    "llama-2-7b": (8, 10, 12, 16, 24, 48, 80),
    "llama-2-13b": (16, 24),
    "llama-33b": (24, 48),
    "huggyllama/llama-65b": (24, 40, 48, 80, 141),
    "llama-2-70b": (24, 40, 48, 80, 141),
}
DEFAULT_SETTINGS = ("data.max_seq_len=2048", "train.batch_size=16", "method=auto")

# What every published figure shares with ours: one pass a step, nothing left open.
_FIXED = ("train.recompute=full", "optim.name=adamw", "optim.paged=false")
_QLORA_PAPER = "[QLoRA paper](https://arxiv.org/abs/2305.14314), figure 6"
_TORCHTUNE = "[torchtune README](https://github.com/pytorch/torchtune)"
_FACTORY = "[LLaMA-Factory wiki](https://github.com/hiyouga/LLaMA-Factory/wiki)"
_CONTEXTS = "[Unsloth benchmarks](https://docs.unsloth.ai/basics/unsloth-benchmarks)"
_UNSLOTH = "https://unsloth.ai/docs/get-started/fine-tuning-for-beginners/unsloth-requirements"
_MINIMUM = f"[Unsloth requirements]({_UNSLOTH})"

_PAPER_SETTINGS = ("method=qlora", "lora.rank=64", "lora.dtype=bfloat16")

_LEAST = (
    "method=qlora", "lora.rank=16", "train.recompute=tiled", "model.embeddings=host",
    "optim.name=adamw8bit",
)  # fmt: skip

_ROWS_ASSUMED = (
    "Theirs is the middle of a range for rows that are not stated. Base, embeddings and head are "
    "{base} of ours; what is left depends on the rows."
)
_LEAST_MEMORY = (
    "Ours with all that saves memory. Base and head are {base}, all else {rest} and the CUDA "
    "context (0.5 GB). Their rows, rank and optimizer are not stated."
)
_CARD = (
    "Theirs is the card, in GiB. A layer takes {layer_working_set} of ours while it works, and "
    "grows with the row. Their optimizer is not stated; 8 bits are our assumption."
)


@dataclass(frozen=True)
class Published:
    """A figure that others published, and our settings for the same run.

    Args:
        bytes: Their figure.
        shape: Rows of a pass and tokens of a row, in our plan.
        settings: Ours, over `_FIXED`.
        why: What of the difference the parts of our plan show; see `_parts` for its fields.
        counts_context: Whether their figure is of the whole process, as nvidia-smi shows it.
    """

    source: str
    model: str
    stated: str
    bytes: float
    shape: tuple[int, int]
    settings: tuple[str, ...]
    why: str
    counts_context: bool = False


PUBLISHED: tuple[Published, ...] = (
    Published(
        _QLORA_PAPER,
        "llama-7b",
        "QLoRA, rank 64, 1 x 512 tokens; an estimate",
        6.9e9,
        (1, 512),
        _PAPER_SETTINGS,
        "The paper puts its base at 5.0 GB without saying what is in it; ours with embeddings and "
        "head is {base}. Beside them theirs has 1.9 GB and ours {rest}, of which 1.9 GB are "
        "adapters, gradients and moments.",
    ),
    Published(
        _QLORA_PAPER,
        "huggyllama/llama-65b",
        "QLoRA, rank 64, 1 x 512 tokens; an estimate",
        45.0e9,
        (1, 512),
        _PAPER_SETTINGS,
        "Base {base}, adapters and gradients {adapters} each in bf16, moments {optimizer_state} in "
        "float32. What is left is activations and a layer at work.",
    ),
    Published(
        _TORCHTUNE,
        "llama-3.1-8b",
        "LoRA, 2 x 2,048 tokens, compiled",
        16.2 * GIB,
        (2, 2048),
        ("method=lora", "lora.rank=8", "lora.dtype=bfloat16"),
        "Base, embeddings and head are {base} in both. The inputs of 32 layers take 1.1 GB, which "
        "leaves 0.2 GB of theirs for a layer at work, as much as its gate and up alone: some of it "
        "waits elsewhere. With recompute offload ours is 17.2 GB.",
    ),
    Published(
        _TORCHTUNE,
        "llama-3.1-8b",
        "QLoRA, 2 x 2,048 tokens, compiled",
        7.4 * GIB,
        (2, 2048),
        ("method=qlora", "lora.rank=8", "lora.dtype=bfloat16"),
        "Moments are in float32 here ({optimizer_state}), in bf16 there.",
    ),
    Published(
        _FACTORY,
        "llama-2-7b",
        "LoRA, 16 to 18 GB; rows assumed",
        17e9,
        (4, 1024),
        ("method=lora", "lora.rank=8"),
        _ROWS_ASSUMED,
        counts_context=True,
    ),
    Published(
        _FACTORY,
        "llama-2-7b",
        "QLoRA, 7 to 9 GB; rows assumed",
        8e9,
        (4, 1024),
        ("method=qlora", "lora.rank=8"),
        _ROWS_ASSUMED,
        counts_context=True,
    ),
    Published(
        _MINIMUM,
        "llama-3.1-8b",
        "QLoRA, absolute minimum",
        6e9,
        (1, 512),
        _LEAST,
        _LEAST_MEMORY,
        counts_context=True,
    ),
    Published(
        _MINIMUM,
        "llama-3.1-70b",
        "QLoRA, absolute minimum",
        41e9,
        (1, 512),
        _LEAST,
        _LEAST_MEMORY,
        counts_context=True,
    ),
    Published(
        _CONTEXTS,
        "llama-3.1-8b",
        "QLoRA, rank 32, 1 x 21,848 tokens, the most on 12 GB",
        12 * GIB,
        (1, 21848),
        ("method=qlora", "lora.rank=32", "train.recompute=offload", "optim.name=adamw8bit"),
        _CARD,
        counts_context=True,
    ),
    Published(
        _CONTEXTS,
        "llama-3.1-70b",
        "QLoRA, rank 32, 1 x 12,106 tokens, the most on 48 GB",
        48 * GIB,
        (1, 12106),
        ("method=qlora", "lora.rank=32", "train.recompute=offload", "optim.name=adamw8bit"),
        _CARD,
        counts_context=True,
    ),
)


def decisions() -> Iterator[str]:
    """A row for each model and memory, with everything left to the planner."""
    yield "| model | memory | method | rows a pass | recompute | optimizer | peak | fits |"
    yield "|---|---|---|---|---|---|---|---|"
    for model, sizes in DECISIONS.items():
        for size in sizes:
            plan = _planned(model, DEFAULT_SETTINGS, f"{size}GB")
            chosen = plan.settings
            paged = ", paged" if chosen["optim.paged"] else ""
            fits = "yes" if plan.fits else f"no: {plan.changes[0]}"
            yield (
                f"| {model} | {size} GB | {plan.method} | {chosen['train.micro_batch_size']} "
                f"| {chosen['train.recompute']} | {chosen['optim.name']}{paged} "
                f"| {_gb(plan.peak_memory_bytes)} | {fits} |"
            )


def published() -> Iterator[str]:
    """A row for each published figure, with ours for the same settings."""
    yield "| source | model | their settings | theirs | our settings | ours | off | why |"
    yield "|---|---|---|---|---|---|---|---|"
    for entry in PUBLISHED:
        rows, tokens = entry.shape
        shape = (f"train.batch_size={rows}", f"train.micro_batch_size={rows}")
        settings = (*_FIXED, *shape, f"data.max_seq_len={tokens}", *entry.settings)
        plan = _planned(entry.model, settings, "141GB")
        ours = plan.peak_memory_bytes + (CONTEXT_BYTES if entry.counts_context else 0)
        context = " with the context" if entry.counts_context else ""
        parts = _parts(plan, entry.bytes)
        yield (
            f"| {entry.source} | {entry.model} | {entry.stated} | {_gb(entry.bytes)} "
            f"| {_shown(entry)} | {_gb(ours)}{context} | {ours / entry.bytes - 1:+.0%} "
            f"| {entry.why.format(**parts)} |"
        )


def _parts(plan: Plan, their_bytes: float) -> dict[str, str]:
    """The parts of a plan by name, and beside its base what is left of ours and of theirs."""
    parts = {part.replace(" ", "_"): _gb(size) for part, size in plan.parts.items()}
    base = sum(plan.parts.get(part, 0) for part in (BASE_4BIT, BASE_DENSE, EMBEDDINGS))
    rest, their_rest = plan.peak_memory_bytes - base, their_bytes - base
    return {**parts, "base": _gb(base), "rest": _gb(rest), "their_rest": _gb(their_rest)}


def _shown(entry: Published) -> str:
    rows, tokens = entry.shape
    chosen = dict(item.split("=") for item in (*_FIXED, *entry.settings))
    paged = " paged" if chosen["optim.paged"] == "true" else ""
    is_on_host = chosen.get("model.embeddings") == "host"
    embeddings = ", embeddings in host memory" if is_on_host else ""
    return (
        f"{chosen['method']}, rank {chosen['lora.rank']}, {rows} x {tokens:,} tokens, recompute "
        f"{chosen['train.recompute']}, {chosen['optim.name']}{paged}{embeddings}"
    )


def _planned(model: str, settings: Iterable[str], device: str) -> Plan:
    run = nibble.load_config(None, [f"model.name={model}", *settings])
    plan, _ = make_plan(run, device)
    return plan


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB"


def main() -> None:
    """Print the tables, or write them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true", help="Put them into docs/planning.md.")
    write = parser.parse_args().write
    page = PAGE.read_text(encoding="utf-8") if write else ""
    for name, rows in (("decisions", decisions()), ("published", published())):
        table = "\n".join(rows)
        print(f"{table}\n", flush=True)
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        block = re.compile(f"(?<={re.escape(begin)}).*?(?={re.escape(end)})", re.DOTALL)
        page, found = block.subn(lambda _, table=table: f"{table}\n", page)
        if write and not found:
            raise SystemExit(f"{PAGE.name} has no block {begin.strip()}")
    if write:
        PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
