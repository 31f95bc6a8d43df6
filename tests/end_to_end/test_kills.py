"""A run that is killed anywhere, and run again, ends with the same bits."""

import csv
import hashlib
import json
import multiprocessing
import os
import random
import runpy
import shutil
import time
from pathlib import Path

import pytest

from nibble.disk import FAULT_POINTS

KILLED_RUN = Path(__file__).with_name("killed_run.py")
IS_TORTURE = os.environ.get("NIBBLE_TORTURE") == "1"
NUM_STEPS = 60 if IS_TORTURE else 20
NUM_EXACT_STEPS = 100 if IS_TORTURE else 20
# What a run measures of itself, beside what it computes.
MEASURED = ("tokens_per_s", "peak_memory_bytes")


class Case:
    """Runs of one method, all alike but for their folder, and the one that was never killed."""

    def __init__(self, method, model, folder):
        self.folder = folder
        folder.mkdir()
        data = folder / "rows.jsonl"
        words = ["one", "two", "three", "four", "five", "six", "seven"]
        rows = [{"prompt": f"say {a} {b}", "completion": f"{b} {a}"} for a in words for b in words]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.settings = [
            *(f"method={method}", f"model.name={model}", f"data.train={data}", "data.eval=0.1"),
            *("data.max_seq_len=64", "data.packing=true", "train.batch_size=4"),
            *("train.micro_batch_size=2", f"train.steps={NUM_STEPS}", "lora.rank=4"),
            *("lora.dropout=0.1", "train.save_every=10", "train.eval_every=7"),
            *("train.recompute=none", "optim.paged=false", "model.embeddings=device"),
        ]
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["nibble.api", "nibble.train.trainer"])
        self.context = context
        points_file = folder / "points"
        assert self.run("whole", points_file=str(points_file)) == 0
        self.points = points_file.read_text().split()
        self.expected = self.results("whole")

    def start(self, name, *more, kill_at=0, points_file=None):
        settings = [*self.settings, *more, f"out={self.folder / name}"]
        given = {"settings": settings, "kill_at": kill_at, "points_file": points_file}
        process = self.context.Process(target=runpy.run_path, args=(str(KILLED_RUN), given))
        process.start()
        return process

    def run(self, name, *more, **options):
        process = self.start(name, *more, **options)
        process.join()
        return process.exitcode

    def results(self, name):
        """Digests of what a run computed: its adapter, its last state, its figures."""
        out = self.folder / name
        adapter = sorted((out / "adapter").iterdir())
        with (out / "metrics.csv").open() as file:
            rows = [
                {column: value for column, value in row.items() if column not in MEASURED}
                for row in csv.DictReader(file)
            ]
        assert [int(row["step"]) for row in rows] == list(range(len(rows)))
        assert len(rows) > NUM_STEPS
        return {
            **{path.name: _digest(path.read_bytes()) for path in adapter},
            "state": _digest((self.last_checkpoint(name) / "state.safetensors").read_bytes()),
            "metrics": _digest(json.dumps(rows).encode()),
        }

    def last_checkpoint(self, name):
        return max((self.folder / name / "checkpoints").iterdir())


def _digest(content):
    return hashlib.sha256(content).hexdigest()


@pytest.fixture(scope="module", params=["lora", "qlora"])
def case(request, tiny_model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kills") / request.param
    return Case(request.param, tiny_model_folder("llama"), folder)


def test_a_run_passes_all_points(case):
    assert {*case.points} == {*FAULT_POINTS}
    assert case.points.count("train.after_step") == NUM_STEPS
    assert case.points.count("checkpoint.after_rename") > NUM_STEPS // 10


def _chosen(points, num_kills):
    """Numbers of points, from 1: every step first, the others evenly."""
    steps = [n for n, name in enumerate(points, 1) if name == "train.after_step"]
    others = [n for n, name in enumerate(points, 1) if name != "train.after_step"]
    num_steps = min(len(steps), num_kills // 2)
    return [*_evenly(steps, num_steps), *_evenly(others, num_kills - num_steps)]


def _evenly(items, count):
    return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]


@pytest.mark.torture
def test_killed_at_any_point_and_run_again_equals_uninterrupted(case):
    """At every step, and before, during and after each save; each third run dies twice."""
    num_kills = 0
    for number, kill_at in enumerate(_chosen(case.points, 120 if IS_TORTURE else 8)):
        assert case.run("killed", kill_at=kill_at) == -9
        num_kills += 1
        if number % 3 == 0:
            num_kills += case.run("killed", kill_at=1 + kill_at // 2) == -9
        assert case.run("killed") == 0
        assert case.results("killed") == case.expected, (kill_at, case.points[kill_at - 1])
        shutil.rmtree(case.folder / "killed")
    print(f"{case.settings[0]}: {num_kills} kills at {len(case.points)} fault points, all equal")


@pytest.mark.torture
def test_killed_at_any_time_and_run_again_equals_uninterrupted(case):
    rng, num_kills = random.Random(0), 0
    began = time.monotonic()
    assert case.run("timed") == 0
    seconds = time.monotonic() - began
    assert case.results("timed") == case.expected
    shutil.rmtree(case.folder / "timed")
    while num_kills < (10 if IS_TORTURE else 2):
        process = case.start("timed")
        time.sleep(seconds * rng.uniform(0.2, 0.95))
        process.kill()
        process.join()
        num_kills += process.exitcode == -9
        assert case.run("timed") == 0
        assert case.results("timed") == case.expected
        shutil.rmtree(case.folder / "timed")
    print(f"{case.settings[0]}: {num_kills} kills at random times, all equal")


@pytest.mark.torture
def test_exact_runs_are_equal(case):
    """Two, and one that was killed: the same bits."""
    settings = ("train.exactness=exact", f"train.steps={NUM_EXACT_STEPS}")
    for name, kill_at in (("first", 0), ("second", 0), ("third", 2 * len(case.points) // 3)):
        assert case.run(name, *settings, kill_at=kill_at) == (-9 if kill_at else 0)
    assert case.run("third", *settings) == 0
    first, second, third = (case.results(name) for name in ("first", "second", "third"))
    assert first == second == third
    assert "exact: the same inputs" in (case.folder / "first/adapter/README.md").read_text()
    print(f"{case.settings[0]}: three exact runs of {NUM_EXACT_STEPS} steps, one killed, all equal")
