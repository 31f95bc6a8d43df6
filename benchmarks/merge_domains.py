"""Are merged models as good as base and adapter, over the five domains?

    python benchmarks/merge_domains.py --runs RUNS [--domains customer legal] [--write]

RUNS holds the comparisons of `benchmarks/domains.py`. Of each, the first QLoRA adapter is merged
onto every target, and the first LoRA adapter onto its 16-bit base in bfloat16 and in float32; 50
held-out prompts are then answered greedily, 48 tokens at most, by base and adapter and by the
merged model. The exit code is 1 where the dequantised target is not within 0.2 % of the adapter's
held-out loss, a certificate of the base of training does not pass, or float32 gives another text.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from recording import machine, write_results

import nibble
from nibble.adapter.certificate import MOST_RISE, Certificate
from nibble.adapter.format import read_adapter
from nibble.adapter.merged_weights import TARGETS
from nibble.data.records import read_records
from nibble.serve.generate import generate

DOMAINS = ("biomedical", "legal", "customer", "code", "maths")
NUM_PROMPTS, NUM_TOKENS = 50, 48


def prompts_of(shared: Path, domain: str) -> list[list[dict[str, str]]]:
    """The turns before the first answer of the first held-out rows."""
    found = []
    for row in list(read_records(shared / "data" / domain / "eval.jsonl"))[:NUM_PROMPTS]:
        roles = [message.role for message in row.messages]
        turns = row.messages[: roles.index("assistant")]
        found.append([{"role": m.role, "content": str(m.content)} for m in turns])
    return found


def num_same_texts(base: str, adapter: Path, merged: Path, storage: str, prompts: list) -> int:
    """How many prompts base and adapter answer as the merged model does."""
    live, tokenizer = nibble.load_base(base, storage)
    read_adapter(live, adapter)
    model, _ = nibble.load_base(str(merged), storage)
    settings = {"max_new_tokens": NUM_TOKENS}
    return sum(
        generate(live, tokenizer, prompt, **settings)
        == generate(model, tokenizer, prompt, **settings)
        for prompt in prompts
    )


def qlora_lines(run: Path, base: str, place: Path) -> tuple[list[str], bool]:
    """A line for every target, and whether the dequantised one is as good."""
    made: dict[str, Certificate] = {}
    for onto in TARGETS:
        made[onto] = nibble.merge(run, place / onto, model=base, onto=onto, anyway=True)
    auto = nibble.merge(run, place / "auto", model=base, anyway=True)
    best = min(made, key=lambda onto: made[onto].measured.merged.loss)
    lines = []
    for onto, certificate in made.items():
        m, merged = certificate.measured, certificate.measured.merged
        lines.append(
            f"| {run.parent.name} | {onto}{' (auto)' if onto == auto.onto else ''} "
            f"| {m.base_loss:.4f} | {m.live_loss:.4f} | {merged.loss:.4f} | {100 * m.rise:+.2f} % "
            f"| {merged.mean_kl:.1e} | {merged.max_kl:.1e} | {100 * merged.top1_agreement:.1f} % "
            f"| {100 * certificate.rounding.kept:.1f} % "
            f"| {'passed' if not certificate.problems else 'refused'} |"
        )
    same = made["dequantized"]
    is_right = same.measured.rise <= MOST_RISE and not same.problems and auto.onto == best
    return lines, is_right


def lora_line(
    run: Path, base: str, shared: Path, place: Path, dtype: torch.dtype
) -> tuple[str, bool]:
    """KL and texts of a LoRA adapter merged in this type."""
    storage = "float32" if dtype == torch.float32 else "bf16"
    out, options = place / f"lora-{storage}", {"storage": storage, "dtype": dtype}
    made = nibble.merge(run, out, model=base, onto="16bit", options=options, anyway=True)
    prompts = prompts_of(shared, run.parent.name)
    same = num_same_texts(base, run / "adapter", out, storage, prompts)
    merged = made.measured.merged
    line = (
        f"| {run.parent.name} | {str(dtype)[6:]} | {made.measured.live_loss:.4f} "
        f"| {merged.loss:.4f} | {merged.mean_kl:.1e} | {merged.max_kl:.1e} "
        f"| {100 * merged.top1_agreement:.2f} % | {same} of {len(prompts)} |"
    )
    is_right = not made.problems and (dtype != torch.float32 or same == len(prompts))
    return line, is_right


def main() -> None:
    """Print both tables, write them if asked to, and judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--domains", nargs="+", default=DOMAINS)
    parser.add_argument("--write", action="store_true")
    chosen = parser.parse_args()
    base = str(chosen.shared / "models" / "base-16m")
    qlora, lora, wrong = [], [], []
    for domain in chosen.domains:
        with tempfile.TemporaryDirectory() as name:
            place, run = Path(name), chosen.runs / domain
            lines, is_right = qlora_lines(run / "qlora-seed0", base, place)
            qlora += lines
            wrong += [] if is_right else [f"{domain} qlora"]
            for dtype in (torch.float32, torch.bfloat16):
                line, is_right = lora_line(run / "lora-seed0", base, chosen.shared, place, dtype)
                lora.append(line)
                wrong += [] if is_right else [f"{domain} lora {dtype}"]
        print("\n".join([*qlora[-len(TARGETS) :], *lora[-2:]]), flush=True)
    print("wrong:", ", ".join(wrong) or "nothing")
    if chosen.write:
        # Paths are of this machine.
        named = {str(chosen.runs): "RUNS", str(chosen.shared): "../shared"}
        sys.argv = [named.get(word, word) for word in sys.argv]
        write_results("merge_domains", _page(qlora, lora))
    sys.exit(bool(wrong))


def _page(qlora: list[str], lora: list[str]) -> list[str]:
    return [
        "# Merged models over five domains",
        "",
        f"Device: {machine()}, {torch.get_num_threads()} thread(s). torch {torch.__version__}. "
        "base-16m, the adapters of docs/domains, seed 0; losses in nats a target token of the "
        "held-out rows, up to 32,768 tokens.",
        "",
        "QLoRA, bfloat16. `auto` is the target that `nibble merge` takes by itself.",
        "",
        "| domain | onto | base | adapter | merged | rise | mean KL | largest | same token | kept "
        "| certificate |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        *qlora,
        "",
        f"LoRA onto its 16-bit base; greedy texts of at most {NUM_TOKENS} tokens.",
        "",
        "| domain | type | adapter | merged | mean KL | largest | same token | same text |",
        "|---|---|---|---|---|---|---|---|",
        *lora,
    ]


if __name__ == "__main__":
    main()
