"""Comparisons whose figures are made up, and sweeps of runs that cost nothing."""

from dataclasses import replace

import pytest

from nibble.config import load_config
from nibble.events import RunStart
from nibble.experiment import engine
from nibble.experiment.compare import Comparison, Record
from nibble.experiment.figures import RunFigures
from nibble.experiment.project import OnDevice
from nibble.experiment.report import build_report

from .stub_runs import STUB, stub_runs

MIB = 2**20
# method: (held-out loss, MiB at the peak, seconds)
LIKELY = {"lora": (2.00, 200, 20.0), "qlora": (2.01, 150, 25.0), "full": (1.50, 600, 40.0)}
NOISE = (-0.010, 0.0, 0.012)
MEASURED = {
    "num_short": 40,
    "num_exact": 10,
    "general_before": 4.0,
    "general_after": 4.2,
    "num_general_tokens": 1444,
}


def made_run(method, seed, figures, *, warnings=()):
    """The figures of a run that never was."""
    loss, peak, seconds = figures
    loss += NOISE[seed % len(NOISE)]
    return RunFigures(
        method=method,
        seed=seed,
        values={
            "base_bytes": 30 * MIB,
            "saved_bytes": 3 * MIB,
            "saved_share": 0.1,
            "trained_values": 1000,
            "peak_memory_bytes": peak * MIB + seed,
            "predicted_peak_memory_bytes": peak * MIB,
            "setup_seconds": 0.3,
            "step_seconds": seconds / 10,
            "train_seconds": seconds,
            "total_seconds": seconds + 9,
            "tokens_per_s": 10_000 / seconds,
            "eval_loss_before": 5.0,
            "eval_loss": loss,
            "token_accuracy_before": 0.1,
            "token_accuracy": 0.6,
            "exact_match": 0.25,
            "general_loss_before": 4.0,
            "general_loss": 4.2,
            "forgetting": 0.2,
        },
        losses={step: loss + 3 / step + 0.01 * seed for step in range(1, 11)},
        held_out={0: 5.0, 10: loss},
        warnings=tuple(warnings),
        parts={"base in 16 bits": 30 * MIB, "saved activations": (peak - 30) * MIB},
        settings={"train.micro_batch_size": 4, "train.recompute": "none", "optim.paged": False},
        made_of={
            "base": "a", "data": "b", "tokenizer": "c", "template": "d", "nibble": "0.1.0",
            "torch": "2.13.0", "transformers": "5", "tokenizers": "0", "safetensors": "0",
            "device": "cpu", "processor": "a processor", "threads": "1",
        },
        start=RunStart(method, "some/model", "cpu", 10, 0, 100, 20, {}, 1),
    )  # fmt: skip


def made_device(method, name, gib, *, is_smallest=False, fits=True):
    """A method on a device that is not here."""
    return OnDevice(method, name, gib * 2**30, fits, 200 * MIB, 0.01, 0.1, 0.001, is_smallest)


def made_comparison(methods, num_seeds=3, **settings):
    """A comparison of files that are not there."""
    words = ["model.name=some/model", "data.train=train.jsonl", "data.eval=eval.jsonl"]
    words += [f"{key}={value}" for key, value in settings.items()]
    runs = {m: load_config(None, [*words, f"method={m}", "train.steps=10"]) for m in methods}
    return Comparison(runs, num_seeds)


@pytest.fixture
def report_of():
    """Makes a report of figures by method; what is a Record instead ended so."""

    def make(figures=None, *, num_seeds=3, change=lambda run: run, devices=True):
        figures = LIKELY if figures is None else figures
        comparison = made_comparison(list(figures), num_seeds)
        records, runs = {}, []
        for seed in comparison.seeds:
            for method, told in figures.items():
                is_told = isinstance(told, Record)
                records[method, seed] = told if is_told else Record(0, measured=MEASURED)
                if not is_told:
                    runs.append(change(made_run(method, seed, told)))
        table = [made_device(m, n, g) for m in figures for n, g in (("T4", 15), ("L40S", 44))]
        table += [made_device(m, "RTX 4060", 8, is_smallest=True) for m in figures]
        kernels = {"4-bit weights": "compiled C", "head": "torch"}
        report = build_report(
            comparison, records, runs, devices=table if devices else (), kernels=kernels
        )
        return replace(report, seeds=tuple(comparison.seeds))

    return make


@pytest.fixture
def stub(monkeypatch):
    """Runs are stubs: see stub_run.py; gives the function that makes them."""
    monkeypatch.setattr(engine, "TRAIN", STUB)
    return stub_runs
