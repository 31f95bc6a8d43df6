"""Figures by method, their differences, and report.json."""

import json
import math

import pytest

from nibble.experiment.compare import Record
from nibble.experiment.criteria import CRITERIA
from nibble.experiment.report import to_json

REFUSED = Record(
    78, "nothing fits: full needs 90 GB, the device has 3 GB.", "lora.rank=8; or try it --anyway"
)


def test_means_and_cuts_are_over_seeds(report_of):
    report = report_of()
    lora, qlora, full = report.methods
    assert lora.figures["eval_loss"].value == pytest.approx(2.0 + 0.002 / 3)
    assert lora.figures["eval_loss"].num_values == 3
    assert qlora.figures["cut_from_lora"].value == pytest.approx(0.25, abs=1e-6)
    assert full.figures["cut_from_lora"].value == pytest.approx(-2, abs=1e-6)
    assert lora.figures["cut_from_full"].value == pytest.approx(2 / 3, abs=1e-6)
    assert "cut_from_lora" not in lora.figures


def test_differences_are_taken_seed_by_seed(report_of):
    report = report_of()
    told = report.difference("eval_loss", "qlora", "lora")
    assert told.found.value == pytest.approx(0.01)
    assert told.share == pytest.approx(0.005, abs=1e-5)
    # Both methods have the same noise: what is left is certain.
    assert told.found.is_apart_from_0
    assert not report.difference("exact_match", "full", "lora").found.is_apart_from_0


def test_the_document_is_plain_and_has_every_criterion(report_of):
    document = json.loads(
        json.dumps(to_json(report_of({"lora": (2.0, 200, 20.0), "full": REFUSED})))
    )
    assert document["version"] == 1
    keys = {criterion.key for criterion in CRITERIA}
    for method in document["methods"].values():
        assert keys < method.keys()
        assert all(found.keys() == {"value", "low", "high"} for found in method.values())
    loss = document["methods"]["lora"]["eval_loss"]
    assert loss["low"] < loss["value"] < loss["high"]
    assert document["methods"]["full"]["eval_loss"]["value"] is None


def test_what_does_not_fit_keeps_the_words_of_the_plan(report_of):
    full = report_of({"lora": (2.0, 200, 20.0), "full": REFUSED}).methods[1]
    assert full.status == "does not fit"
    assert full.reason == f"{REFUSED.reason} (what would fit: lora.rank=8)"
    assert full.figures == {}


def test_a_failed_method_has_its_reason(report_of):
    failed = Record(76, "step 3: the loss is nan", "lower optim.lr")
    report = report_of({"lora": (2.0, 200, 20.0), "qlora": failed})
    assert report.methods[1].status == "failed"
    assert report.methods[1].reason == "step 3: the loss is nan (fix: lower optim.lr)"
    assert report.differences == ()


def test_one_seed_gives_values_without_intervals(report_of):
    document = to_json(report_of(num_seeds=1))
    loss = document["methods"]["lora"]["eval_loss"]
    assert (loss["low"], loss["high"]) == (None, None)
    assert math.isfinite(loss["value"])
    assert not any(found["is_told_apart"] for found in document["differences"])


def test_runs_that_are_not_alike_are_named(report_of):
    from dataclasses import replace

    def elsewhere(run):
        threads = "2" if run.seed else "1"
        return replace(run, made_of={**run.made_of, "threads": threads})

    assert report_of(change=elsewhere).differs == ("threads",)
    assert report_of().differs == ()
