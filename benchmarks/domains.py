"""Write docs/domains from the reports of five comparisons, each figure checked against its runs.

    nibble compare recipes/<domain>.yaml --set full:optim.lr=3e-4 --out RUNS/<domain>
    python benchmarks/domains.py --runs RUNS     checks the figures, then writes the pages
    python benchmarks/domains.py --check         exits 1 if a page is not what its report says

A report stands beside its page as JSON. The check reads the logs of events line by line and takes
means, intervals and differences anew; nothing of `nibble.experiment` does so for it.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from math import isclose, sqrt
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from held_out_loss import PEERS

from nibble.experiment.criteria import Unit, written
from nibble.experiment.statistics import Estimate

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "docs" / "domains"
METHODS = ("lora", "qlora", "full")
# Title, what the task is, what its figures mean.
DOMAINS = {
    "biomedical": (
        "Biomedical questions",
        "A question on a disease, a gene or a treatment; the answer is a paragraph of prose. "
        "3,000 rows of MedQuAD to train on, 300 held out.",
        "The loss is that of long free text, so it falls slowly, and a method is told from "
        "another by little. It says how well the wording is met and nothing of whether an answer "
        "is true: read answers before you trust them.",
    ),
    "legal": (
        "Legal classification and reasoning",
        "A case, a clause or a sentence with a question; the answer is a label such as Yes or No. "
        "Tasks of LegalBench: diversity jurisdiction, hearsay, personal jurisdiction, private "
        "right of action, marks, unfair terms, overruling. 2,835 rows to train on, 300 held out.",
        "An answer is one label and its end, so few tokens carry loss and a single row weighs "
        "much: seeds differ more here than elsewhere. Before training the base knows no label. "
        "Short answers right is the accuracy in the usual sense; labels are few, so hold it "
        "beside the share of the most frequent one.",
    ),
    "customer": (
        "Customer service",
        "What a customer writes; the answer is the category, the intent and the entities in it, a "
        "line each. 6,480 rows of Bitext to train on, 300 held out.",
        "Most tokens of an answer follow from its intent, so many tokens are right. A short "
        "answer is right only as a whole, the copied order number included, which a base this "
        "small seldom manages. Both files share many paraphrases: the loss says how well the "
        "scheme was learnt, not how utterances of another kind would fare.",
    ),
    "code": (
        "Code",
        "A task in one sentence and one test; the answer is a Python function. 800 rows of MBPP "
        "to train on, 174 held out.",
        "The loss is that of the reference solution, token by token. No function is run: two "
        "methods with one loss may differ in how many tests pass, and a base this small passes "
        "few whatever the method.",
    ),
    "maths": (
        "Grade-school maths",
        "A word problem; the answer is worked out line by line and ends with a number. 3,000 rows "
        "of GSM8K to train on, 300 held out.",
        "The loss is that of the worked steps; the number at the end is a small part of it. The "
        "form of a solution is learnt first, and a base this small learns hardly more: a lower "
        "loss need not be a right number.",
    ),
}
NUM_SEEDS = 3
PEER_STEPS = 80
# Student's t of two degrees of freedom within which 95 % of the mass lies, in closed form.
_T = 0.95 * sqrt(2 / (1 - 0.95**2))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, help="Where the comparisons are, a folder each.")
    parser.add_argument("--check", action="store_true", help="Write nothing.")
    arguments = parser.parse_args()
    if arguments.runs is not None:
        for name in DOMAINS:
            if (arguments.runs / name / "report.json").is_file():
                _take(arguments.runs / name, name, arguments.check)
    reports = {
        name: json.loads((PAGES / f"{name}.json").read_text(encoding="utf-8"))
        for name in DOMAINS
        if (PAGES / f"{name}.json").is_file()
    }
    pages = {f"{name}.md": "\n".join(page(name, report)) for name, report in reports.items()}
    pages["README.md"] = "\n".join(overview(reports))
    stale = []
    for file, text in pages.items():
        path = PAGES / file
        if not path.is_file() or path.read_text(encoding="utf-8") != text + "\n":
            stale.append(file)
            if not arguments.check:
                path.write_text(text + "\n", encoding="utf-8")
    if arguments.check and stale:
        print(f"not as the reports say: {', '.join(stale)}; run benchmarks/domains.py")
        return 1
    return 0


def _take(place: Path, name: str, is_check: bool) -> None:
    """Check a report against its runs, and put it beside its page."""
    report = json.loads((place / "report.json").read_text(encoding="utf-8"))
    print(f"{name}: {check_report(place, report)} figures equal those of the runs' events")
    if not is_check:
        shutil.copyfile(place / "report.json", PAGES / f"{name}.json")
        shutil.copyfile(place / "loss.png", PAGES / f"{name}.png")


def page(name: str, report: dict[str, Any]) -> Iterator[str]:
    """What was measured in one domain."""
    title, task, meaning = DOMAINS[name]
    yield from (f"# {title}", "", "<!-- Made by `benchmarks/domains.py`. -->", "", task, "")
    yield from ("```", command_of(name), "```", "")
    yield f"[{name}.yaml](../../recipes/{name}.yaml) says why each setting is as it is. Measured:"
    yield ""
    for fact in ("model", "work", "seeds", "settings", "machine", "packages"):
        yield f"- {fact}: {_cell(report['facts'][fact])}"
    if report["settings"]["train.steps"] != PEER_STEPS:
        yield "- the peers' figures are of 80 steps; that took over 3 minutes a run on this machine"
    yield from ("", "## In six rows", "")
    yield from _table(
        ("", *METHODS),
        [(row, *(cells[m] for m in METHODS)) for row, cells in report["summary"].items()],
    )
    yield from ("", "## Which to use", "", _cell(report["answer"]), "", "## What it means", "")
    yield from (meaning, "", f"![Loss over steps: {name}]({name}.png)", "")
    yield "Lines are means over seeds of the training loss, bands their range, marks the held-out"
    yield f"loss. All figures: [{name}.json]({name}.json)."
    yield from ("", "## Notes", "", *(f"- {_cell(note)}" for note in report["notes"]))


def overview(reports: dict[str, dict[str, Any]]) -> Iterator[str]:
    """One table over the domains."""
    yield from ("# Five domains", "", "<!-- Made by `benchmarks/domains.py`. -->", "")
    yield "LoRA, QLoRA and full fine-tuning of one small base (16 million weights) on real data,"
    yield "by [`nibble compare`](../compare.md) with the recipes in [recipes](../../recipes). Means"
    yield "over three seeds; ± is half of Student's 95 % interval. Each domain has a page with its"
    yield "six rows, the answer and the loss curves."
    missing = [name for name in DOMAINS if name not in reports]
    if missing:
        yield from ("", f"Not measured yet: {', '.join(missing)}.")
    yield from ("", "## Held-out loss", "", "In nats per target token.", "")
    columns = ("domain", "steps", "before", *METHODS, "qlora against lora", "within 1 %")
    yield from _table(columns, [(_link(n), *_losses(r)) for n, r in reports.items()])
    yield from ("", "In brackets the 95 % interval of the difference, taken seed by seed.", "")
    yield from ("## Memory and time", "")
    columns = ("domain", *(f"peak, {m}" for m in METHODS), *(f"all steps, {m}" for m in METHODS))
    yield from _table(columns, [(_link(n), *_costs(r)) for n, r in reports.items()])
    yield from ("", "On one thread of a machine that had other work for most of the time: a wide")
    yield "interval of a time says how uneven that was. For full the plan chose other rows a"
    yield "pass with some seeds, the fastest by its forecast, and its peak moves with them."
    yield from ("", "## Beside PEFT and bitsandbytes", "")
    yield "The peers' figures are of one seed, 80 steps and the same settings"
    yield "(`benchmarks/held_out_loss.py` has them). Our held-out loss over theirs, where ours is"
    yield from ("of 80 steps too:", "")
    rows = [(_link(n), *_ratios(n, r)) for n, r in reports.items()]
    yield from _table(("domain", *METHODS), rows)
    yield from ("", "One seed tells no interval: `benchmarks/quality_vs_peers.py` compares seed by")
    yield "seed."


def command_of(name: str) -> str:
    """The command at the head of a recipe."""
    lines = (ROOT / "recipes" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    return next(line.strip("# ") for line in lines if line.startswith("#   nibble compare"))


def _losses(report: dict[str, Any]) -> Iterator[str]:
    yield str(report["settings"]["train.steps"])
    yield _figure(report, "lora", "eval_loss_before", "nats")
    yield from (_figure(report, method, "eval_loss", "nats") for method in METHODS)
    found = _difference(report)
    lora = report["methods"]["lora"]["eval_loss"]["value"]
    ends = [f"{100 * found[end] / lora:+.2f}" for end in ("low", "high")]
    yield f"{100 * found['share']:+.2f} % ({ends[0]} to {ends[1]})"
    is_within, is_apart = abs(found["share"]) <= 0.01, found["is_told_apart"]
    yield "yes" if is_within else "no" if is_apart else "no, not told apart from 0"


def _costs(report: dict[str, Any]) -> Iterator[str]:
    yield from (_figure(report, method, "peak_memory_bytes", "bytes") for method in METHODS)
    yield from (_figure(report, method, "train_seconds", "seconds") for method in METHODS)


def _ratios(name: str, report: dict[str, Any]) -> Iterator[str]:
    for method in METHODS:
        ours = report["methods"][method]["eval_loss"]["value"]
        is_same = report["settings"]["train.steps"] == PEER_STEPS
        yield f"{ours / PEERS[name][method]:.3f}" if is_same else "-"


def _figure(report: dict[str, Any], method: str, key: str, unit: Unit) -> str:
    found = report["methods"][method][key]
    estimate = Estimate(found["value"], found["low"], found["high"], len(report["seeds"]))
    return written(estimate, unit)


def _difference(report: dict[str, Any]) -> dict[str, Any]:
    """QLoRA's held-out loss less LoRA's."""
    return next(
        found
        for found in report["differences"]
        if found["criterion"] == "eval_loss" and found["methods"] == ["qlora", "lora"]
    )


def _link(name: str) -> str:
    return f"[{name}]({name}.md)"


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield f"|{'---|' * len(columns)}"
    for first, *cells in rows:
        yield f"| {' | '.join([first, *map(_cell, cells)])} |"


def _cell(text: str) -> str:
    return text.replace("_", r"\_").replace("|", r"\|").replace("<", r"\<")


def check_report(place: Path, report: dict[str, Any]) -> int:
    """The number of figures in a report that its runs' events have as well.

    Raises:
        SystemExit: If one differs.
    """
    seeds = report["seeds"]
    if len(seeds) != NUM_SEEDS:
        sys.exit(f"{place}: {len(seeds)} seeds, expected {NUM_SEEDS}")
    runs = {m: {s: _run_values(place / f"{m}-seed{s}") for s in seeds} for m in METHODS}
    num_checked = 0
    for method, of_seed in runs.items():
        for key in of_seed[seeds[0]]:
            values = [of_seed[seed][key] for seed in seeds]
            _compare(f"{place}: {method}: {key}", report["methods"][method][key], values)
            num_checked += 1
    for found in report["differences"]:
        ours, theirs = found["methods"]
        key = found["criterion"]
        values = [runs[ours][seed][key] - runs[theirs][seed][key] for seed in seeds]
        _compare(f"{place}: {key}: {ours} - {theirs}", found, values)
        num_checked += 1
    return num_checked


def _compare(what: str, told: dict[str, Any], values: list[float]) -> None:
    mean = fmean(values)
    half = _T * stdev(values) / sqrt(NUM_SEEDS)
    for end, value in (("value", mean), ("low", mean - half), ("high", mean + half)):
        if not isclose(told[end], value, rel_tol=1e-9, abs_tol=1e-9 * abs(mean)):
            sys.exit(f"{what}: {end} is {told[end]} in the report, {value} by the events")


def _run_values(out: Path) -> dict[str, float]:
    """The figures of one run off its log of events and what was measured afterwards."""
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    steps = {event["step"]: event for event in events if event["event"] == "step"}
    evals = {event["step"]: event for event in events if event["event"] == "eval"}
    load, end = (_last(events, kind) for kind in ("load_end", "run_end"))
    record = json.loads(out.with_name(f"{out.name}.json").read_text())
    measured, resident = record["measured"], load["resident_bytes"]
    base = sum(size for kind, size in resident.items() if kind != "float32 adapters")
    first, last = evals[0], evals[max(evals)]
    values = {
        "base_bytes": base,
        "saved_bytes": end["adapter_bytes"],
        "trained_values": load["num_trainable"],
        "setup_seconds": load["seconds"],
        "step_seconds": median(event["seconds"] for event in steps.values()),
        "train_seconds": end["seconds"],
        "tokens_per_s": end["tokens"] / end["seconds"],
        "total_seconds": record["seconds"],
        "peak_memory_bytes": max(e["peak_memory_bytes"] for e in (*steps.values(), end)),
        "predicted_peak_memory_bytes": end["predicted_peak_memory_bytes"],
        "eval_loss_before": first["loss"],
        "eval_loss": last["loss"],
        "token_accuracy_before": first["token_accuracy"],
        "token_accuracy": last["token_accuracy"],
        "general_loss_before": measured["general_before"],
        "general_loss": measured["general_after"],
        "forgetting": measured["general_after"] - measured["general_before"],
    }
    if measured["num_short"]:
        values["exact_match"] = measured["num_exact"] / measured["num_short"]
    return values


def _last(events: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    return [event for event in events if event["event"] == kind][-1]


if __name__ == "__main__":
    sys.exit(main())
