"""What a plan says of other GPUs."""

import json

import pytest

from nibble.experiment import project
from nibble.experiment.compare import read_comparison
from nibble.plan.devices import DEVICES

DECIDED = (
    "data.max_seq_len=64", "train.recompute=none", "train.micro_batch_size=1", "train.steps=1000",
    "optim.paged=false", "train.batch_size=2",
)  # fmt: skip


@pytest.fixture
def comparison(tiny_model_folder, tmp_path):
    rows = [{"prompt": f"say {n}", "completion": f"{n}"} for n in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [f"model.name={tiny_model_folder('llama')}", f"data.train={tmp_path / 'rows.jsonl'}"]
    return read_comparison(None, [*words, *DECIDED], methods=["lora", "qlora"])


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(project, "SHOWN", ("T4",))


def test_every_method_has_a_device_and_the_smallest(comparison, few, tmp_path):
    found = project.project(comparison, tmp_path)
    assert [(one.method, one.is_smallest) for one in found] == [
        ("lora", False), ("lora", True), ("qlora", False), ("qlora", True),
    ]  # fmt: skip
    least = min(device.memory_bytes for device in DEVICES)
    for one in found:
        assert one.fits
        assert 0 < one.needed_bytes < one.memory_bytes
        assert one.total_seconds == pytest.approx(1000 * one.step_seconds)
        assert one.is_smallest == (one.memory_bytes == least)
    assert found[0].cost > 0


def test_it_is_planned_once(comparison, few, tmp_path, monkeypatch):
    first = project.project(comparison, tmp_path)
    monkeypatch.setattr(project, "_of_method", pytest.fail)
    assert project.project(comparison, tmp_path) == first


@pytest.mark.parametrize("text", ["", "{", "[]", '{"made_for": {}, "found": [1]}'])
def test_what_was_planned_and_is_broken_is_planned_again(
    comparison, few, tmp_path, monkeypatch, text
):
    (tmp_path / project.PROJECTION_FILE).write_text(text)
    monkeypatch.setattr(project, "_of_method", lambda run: iter(()))
    assert project.project(comparison, tmp_path) == []


def test_a_method_that_cannot_be_planned_is_left_out(comparison, few, tmp_path):
    target = {"lora.target": ["no_proj"]}
    comparison.runs["lora"] = comparison.runs["lora"].with_values(target, "flag")
    found = project.project(comparison, tmp_path)
    assert {one.method for one in found} == {"qlora"}


def test_a_model_that_fits_no_device_has_no_smallest(comparison, few, monkeypatch):
    huge = project.DEVICES[0].__class__("small", "cuda", 2**20, 1e12, 1e11, 1e10)
    monkeypatch.setattr(project, "DEVICES", (huge,))
    monkeypatch.setattr(project, "find_device", lambda name: huge)
    (one,) = project._of_method(comparison.runs["lora"])
    assert (one.fits, one.cost, one.is_smallest) == (False, None, False)
