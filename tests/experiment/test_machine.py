"""The processes of this machine, those of another sweep too."""

import os
import subprocess
import sys
import time

import pytest

from nibble.errors import UnavailableError
from nibble.experiment import cards, engine, machine
from nibble.experiment.cards import Card
from nibble.experiment.machine import Machine, this_machine
from nibble.experiment.placement import Place

HERE = Place("a", 10, environment={"OMP_NUM_THREADS": "1"})


def _start_and_end(planned, out):
    """Start a run as a process does that ends then: nobody waits for the run."""
    child = os.fork()
    if child == 0:
        Machine(lambda: [HERE]).start(planned, out, at=HERE)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def test_a_run_of_another_sweep_is_found_followed_and_stopped(tmp_path, stub):
    (planned,) = stub([0.01], [1], steps=400)
    second = Machine(lambda: [HERE])
    assert second.at_work(tmp_path, ["run-1"]) == {}
    _start_and_end(planned, tmp_path)
    found = second.at_work(tmp_path, ["run-1", "run-2"])
    assert found.keys() == {"run-1"}
    handle, place = found["run-1"]
    assert place == "a"
    assert second.ended(handle) is None
    while not (tmp_path / "run-1" / "checkpoints" / "saved").is_file():
        time.sleep(0.02)
    second.stop([handle])
    ended = second.ended(handle)
    assert (ended.is_resumable, ended.reason) == (True, "ended unseen")
    assert second.at_work(tmp_path, ["run-1"]) == {}


@pytest.mark.parametrize(("visible", "place"), [(None, "one"), ("5", "two"), ("9,5", "one")])
def test_a_run_that_was_started_by_hand_counts_where_it_sees_a_device(
    tmp_path, stub, monkeypatch, visible, place
):
    (planned,) = stub([0.01], [1], steps=400)
    places = [
        Place("one", 10, environment={"CUDA_VISIBLE_DEVICES": "3"}),
        Place("two", 10, environment={"CUDA_VISIBLE_DEVICES": "5"}),
    ]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    given = {"CUDA_VISIBLE_DEVICES": visible} if visible else {}
    started = engine.start(planned.run, tmp_path, "run-1", environment=given)
    found = Machine(lambda: places).at_work(tmp_path, ["run-1"])
    started.process.kill()
    started.process.wait()
    assert found["run-1"][1] == place


def test_places_are_looked_at_anew_while_nothing_is_at_work():
    looks = iter([[HERE], [HERE, Place("b", 1)]])
    here = Machine(lambda: next(looks))
    assert here.places(is_idle=False) == [HERE]
    assert here.places(is_idle=False) == [HERE]
    assert len(here.places(is_idle=True)) == 2


def test_a_cpu_takes_so_many_runs_and_gives_each_its_share(monkeypatch):
    monkeypatch.setattr(machine, "read_cards", list)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    for workers, most, environment in ((None, 1, {}), (4, 4, {"OMP_NUM_THREADS": "2"})):
        found, device = this_machine(workers)
        (place,) = found.places(is_idle=True)
        assert (place.most_runs, place.environment) == (most, environment)
        assert place.memory_bytes > 0
        assert device.type == "cpu"


def test_every_card_is_a_place_and_the_largest_is_planned_for(monkeypatch):
    gib = 2**30
    here = [
        Card("NVIDIA L4", "8.9", 22 * gib, 9 * gib),
        Card("NVIDIA L4", "8.9", 22 * gib, 20 * gib),
    ]
    monkeypatch.setattr(machine, "read_cards", lambda: here)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    found, device = this_machine(None)
    assert (device.name, device.memory_bytes) == ("L4", 20 * gib)
    places = found.places(is_idle=True)
    assert [(p.name, p.memory_bytes, p.most_runs) for p in places] == [
        ("cuda:0", 9 * gib, None),
        ("cuda:1", 20 * gib, None),
    ]
    assert [p.environment for p in places] == [
        {"CUDA_VISIBLE_DEVICES": "3"},
        {"CUDA_VISIBLE_DEVICES": "5"},
    ]
    assert places[0].host_bytes > 0


def test_gpus_that_do_not_answer_are_an_error(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)

    def fail(*words, **options):
        return subprocess.CompletedProcess(words, 1, "", "Traceback\nRuntimeError: no driver\n")

    monkeypatch.setattr(cards.subprocess, "run", fail)
    with pytest.raises(UnavailableError, match="no driver"):
        cards.read_cards()
    told = subprocess.CompletedProcess(
        [sys.executable], 0, 'hello\n[{"name": "A", "capability": "8.0", "total_bytes": 2, '
        '"free_bytes": 1}]\n', "",
    )  # fmt: skip
    monkeypatch.setattr(cards.subprocess, "run", lambda *words, **options: told)
    assert cards.read_cards() == [Card("A", "8.0", 2, 1)]
