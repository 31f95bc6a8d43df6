"""The same sweep on a Ray cluster of which a node is lost."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from nibble.errors import UnavailableError, UsageError
from nibble.events import RunEnd, read_events
from nibble.experiment import ray_engine
from nibble.experiment.cards import Card
from nibble.experiment.placement import Need, Place
from nibble.experiment.ray_engine import Node, connected, resources

PROCESS = Path(__file__).with_name("ray_process.py")
ROOT = Path(__file__).resolve().parents[2]
needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")


def _sweep(out, *words):
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(PROCESS), str(out), *words],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "PYTHONPATH": path},
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((out / "report.json").read_text())
    kept = ("name", "state", "steps", "train_loss", "eval_loss", "sha256")
    return done.stdout, [{key: row[key] for key in kept} for row in report["runs"]]


@needs_ray
@pytest.mark.slow
def test_a_sweep_that_loses_a_node_ends_with_the_same_table(tmp_path):
    """Two nodes of two CPUs, six runs: those of the lost node go on from their checkpoints."""
    whole = _sweep(tmp_path / "whole")
    lost = _sweep(tmp_path / "lost", "lose")
    assert whole[1] == lost[1]
    assert len(whole[1]) == 6
    assert {row["state"] for row in whole[1]} == {"finished"}
    assert "nodes 2" in whole[0]
    assert "nodes 1" in lost[0]
    again = [
        path.parent.name
        for path in (tmp_path / "lost").glob("run-*/events.jsonl")
        if '"steps_done": 0' not in path.read_text().splitlines()[-1]
        and sum('"run_start"' in line for line in path.read_text().splitlines()) == 2
    ]
    assert len(again) == 2
    for path in (tmp_path / "lost").glob("run-*/events.jsonl"):
        ends = [event for event in read_events(path) if isinstance(event, RunEnd)]
        assert len(ends) == 1


def test_resources_are_those_of_the_plan(stub):
    (run,) = stub([0.01], [6 * 10**9])
    machine = Node("n", "1", 8, 10**10)
    asked = resources(run, Place("n", 10**10, most_runs=2), machine)
    assert asked == {"num_cpus": 4, "memory": 6 * 10**9}
    run = type(run)(run.trial, run.run, Need(6 * 10**9, 10**9))
    cards = Node("n", "1", 8, 10**10, [Card("A10", "8.6", 24 * 10**9, 23 * 10**9)])
    asked = resources(run, Place("n cuda:0", 23 * 10**9, host="n"), cards)
    assert asked == {"num_cpus": 1, "num_gpus": 0.2609, "memory": 10**9}


def test_without_a_token_nothing_is_connected_to(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(UsageError, match="RAY_AUTH_MODE is 'disabled'"), connected(1):
        pass


def test_without_ray_its_install_line_is_named(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UnavailableError, match=r"pip install .nibble\[ray\]"), connected(1):
        pass


def test_every_machine_or_every_card_is_a_place(monkeypatch):
    cluster = ray_engine.Cluster(None)
    nodes = [Node("a", "1", 8, 10), Node("b", "2", 0, 10)]
    monkeypatch.setattr(ray_engine.Cluster, "nodes", lambda self: nodes)
    assert cluster.places(is_idle=True) == [Place("a", 10, most_runs=1)]
    nodes.append(Node("c", "3", 8, 99, [Card("A10", "8.6", 24, 23)] * 2))
    found = cluster.places(is_idle=True)
    assert [place.name for place in found] == ["c cuda:0", "c cuda:1"]
    assert {(p.memory_bytes, p.host, p.host_bytes, p.most_runs) for p in found} == {
        (23, "c", 99, None)
    }
