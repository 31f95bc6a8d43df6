"""Write plan_decisions.json: what the planner decides for known models and memories.

    python tests/golden/make_plan_decisions.py

2,048 tokens a row, 16 rows a step, method and settings open. Only the memory is known, so time
counts by a typical ratio of FLOPs to bytes.
"""

import json
from pathlib import Path

import nibble
from nibble.plan.plan import Plan

CASES = {
    "llama-2-7b": (8, 10, 12, 16, 24, 48, 80),
    "llama-2-13b": (16, 24),
    "llama-33b": (24, 48),
    "huggyllama/llama-65b": (24, 40, 48, 80, 141),
    "llama-2-70b": (24, 40, 48, 80, 141),
    "llama-3.2-1b": (8, 24, 80),
}


def decide(model: str, gigabytes: int) -> dict:
    """The decision for one model and one amount of memory."""
    run = nibble.load_config(None, [f"model.name={model}", "data.max_seq_len=2048"])
    return summary(nibble.plan(run, f"{gigabytes}GB"))


def summary(plan: Plan) -> dict:
    """What a change of the planner must not change unseen."""
    return {
        "fits": plan.fits,
        **plan.settings,
        "peak_gb": round(plan.peak_memory_bytes / 1e9, 2),
        "reason": plan.reasons[0],
    }


def main() -> None:
    decisions = {
        f"{model} on {gigabytes} GB": decide(model, gigabytes)
        for model, sizes in CASES.items()
        for gigabytes in sizes
    }
    path = Path(__file__).with_name("plan_decisions.json")
    path.write_text(json.dumps(decisions, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
