"""Sweeps: killed, stopped, failing, halved; never over-committed, every run once."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from nibble.errors import RunInterrupted, StoppedError
from nibble.events import RunEnd, read_events
from nibble.experiment import engine, ranking, record, sweep
from nibble.experiment.machine import Machine
from nibble.experiment.placement import Need, Place
from nibble.experiment.record import Planned
from nibble.train import folder
from nibble.train.interrupt import StopSignal, stop_signals

PROCESS = Path(__file__).with_name("sweep_process.py")
# What a run measures of itself, or which of the free devices it got.
MEASURED = ("seconds", "device", "adapter", "peak_memory_bytes", "predicted_memory_bytes")


def _table(out):
    """The rows of the report without what was measured."""
    report = json.loads((out / "report.json").read_text())
    assert report["version"] == 1
    rows = [{k: v for k, v in row.items() if k not in MEASURED} for row in report["runs"]]
    return rows, report["winner"]["name"]


def _used(out):
    path = out / "used"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _most_used(out, needs):
    """The most memory in use at a time, by place."""
    most, now = {}, {}
    for line in sorted(_used(out), key=lambda line: (line["at"], line["what"] == "begins")):
        sign = 1 if line["what"] == "begins" else -1
        place = line["place"]
        now[place] = now.get(place, 0) + sign * needs[line["run"]]
        most[place] = max(most.get(place, 0), now[place])
    return most


def _num_finished(out):
    return sum(
        isinstance(event, RunEnd)
        for path in out.glob("run-*/events.jsonl")
        for event in read_events(path)
    )


def _wait_until(is_so):
    give_up = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < give_up
        time.sleep(0.02)


def _start(out):
    # Its own session, so that nothing but the sweep is killed.
    return subprocess.Popen([sys.executable, str(PROCESS), str(out)], start_new_session=True)


def test_a_sweep_killed_twice_ends_as_if_it_was_not(tmp_path):
    """Eight runs on four devices of 100 bytes; those at work outlive the killed sweep."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert _start(whole).wait() == 0
    for num_begun, num_finished in ((2, 0), (6, 3)):
        process = _start(killed)
        _wait_until(lambda n=num_begun: len({line["run"] for line in _used(killed)}) >= n)
        _wait_until(lambda n=num_finished: _num_finished(killed) >= n)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert not (killed / "report.json").exists()
    assert _start(killed).wait() == 0
    assert _table(killed) == _table(whole)
    assert _table(whole)[1] == "run-8"
    needs = {
        entry["name"]: entry["memory_bytes"]
        for entry in json.loads((whole / "sweep.json").read_text())["runs"]
    }
    assert len(needs) == 8
    assert max(_most_used(whole, needs).values()) == 100
    for out in (whole, killed):
        most = _most_used(out, needs)
        assert most.keys() == {"gpu0", "gpu1", "gpu2", "gpu3"}
        assert max(most.values()) <= 100
        begun = [line["run"] for line in _used(out) if line["what"] == "begins"]
        assert sorted(begun) == sorted(needs)
        assert _num_finished(out) == 8
    assert _start(killed).wait() == 0
    assert _num_finished(killed) == 8


def test_a_sweep_that_is_stopped_stops_its_runs_in_order_and_goes_on(tmp_path, stub):
    planned, stop = stub([0.01, 0.02], [60, 60], steps=30), StopSignal()
    machine = Machine(lambda: [Place("a", 60)])

    def ask():
        _wait_until(lambda: len(_used(tmp_path)) == 1)
        stop.name = "SIGTERM"

    asking = threading.Thread(target=ask)
    asking.start()
    with pytest.raises(StoppedError, match="stopped by SIGTERM; 0 of 2 runs are done"):
        sweep.run_sweep(tmp_path, planned, machine, stop=stop)
    asking.join()
    assert [line["what"] for line in _used(tmp_path)] == ["begins", "ends"]
    rows = sweep.run_sweep(tmp_path, planned, machine)
    assert [row.state for row in rows] == ["finished", "finished"]
    assert _num_finished(tmp_path) == 2
    assert sweep.exit_code_of(rows) == 0


def test_a_second_signal_amid_a_start_forgets_no_process(tmp_path, stub):
    """It comes after the process is there and before anybody has noted it."""

    started = []

    class Interrupted(Machine):
        def start(self, planned, out, *, at):
            started.append(super().start(planned, out, at=at).process)
            _wait_until(lambda: _used(out))
            for _ in range(2):  # another one soon after a SIGTERM would count as the same
                os.kill(os.getpid(), signal.SIGINT)

    machine = Interrupted(lambda: [Place("a", 1)])
    with pytest.raises(RunInterrupted, match="0 of 1 runs are done"), stop_signals() as stop:
        sweep.run_sweep(tmp_path, stub([0.01], [1], steps=600), machine, stop=stop)
    assert [line["what"] for line in _used(tmp_path)] == ["begins", "ends"]
    assert started[0].poll() is not None


def test_a_run_started_by_hand_is_taken_over_where_it_takes_memory(tmp_path, stub):
    planned, places = stub([0.01, 0.02], [60, 60]), [Place("a", 100)]
    run = planned[0].run.with_values({"out": str(tmp_path / "run-1")}, "flag")
    (tmp_path / "run-1.yaml").write_text(folder.run_text(run))
    env = {**os.environ, "NIBBLE_PLACE": ""}
    by_hand = subprocess.Popen([*engine.TRAIN, "run-1.yaml"], cwd=tmp_path, env=env)
    _wait_until(lambda: _used(tmp_path))
    rows = sweep.run_sweep(tmp_path, planned, Machine(lambda: places))
    assert by_hand.wait() == 0
    assert [row.state for row in rows] == ["finished", "finished"]
    assert [line["what"] for line in _used(tmp_path)] == ["begins", "ends"] * 2


def test_a_run_at_work_with_another_config_is_not_taken_over(tmp_path, stub):
    first, second = stub([0.01, 0.02], [1, 1], steps=40)
    other = first.run.with_values({"optim.lr": 0.5}, "flag")
    by_hand = engine.start(other, tmp_path, "run-1", environment={"NIBBLE_PLACE": "a"})
    rows = sweep.run_sweep(tmp_path, [first, second], Machine(lambda: [Place("a", 100)]))
    assert [(row.state, row.exit_code) for row in rows] == [("failed", 73), ("finished", 0)]
    assert "run-1.yaml was changed" in rows[0].reason
    assert by_hand.process.wait() == 0


def test_a_failed_run_is_tried_again_by_the_next_sweep(tmp_path, stub):
    planned, machine = stub([0.01], [1]), Machine(lambda: [Place("a", 1)])
    fails = Machine(lambda: [Place("a", 1)], train=("false",))
    assert sweep.run_sweep(tmp_path, planned, fails)[0].reason == "ended with exit code 1"
    assert sweep.run_sweep(tmp_path, planned, machine)[0].state == "finished"


def test_a_run_whose_adapter_is_gone_is_not_finished(tmp_path, stub):
    planned, machine = stub([0.01, 0.02], [1, 1], steps=2), Machine(lambda: [Place("a", 1)])
    sweep.run_sweep(tmp_path, planned, machine)
    (tmp_path / "run-1" / "adapter" / "a.safetensors").unlink()
    rows = sweep.run_sweep(tmp_path, planned, machine)
    assert [row.state for row in rows] == ["finished", "finished"]
    assert (tmp_path / "run-1" / "adapter" / "a.safetensors").is_file()
    assert [line["run"] for line in _used(tmp_path)[::2]] == ["run-1", "run-2", "run-1"]


def test_an_error_stops_the_runs_too(tmp_path, stub):
    def refuse(rows):
        if _used(tmp_path):
            raise RunInterrupted("stopped")

    with pytest.raises(RunInterrupted):
        sweep.run_sweep(
            tmp_path, stub([0.01], [1], steps=300), Machine(lambda: [Place("a", 1)]), show=refuse
        )
    assert _used(tmp_path)[-1]["what"] == "ends"


def test_the_others_finish_after_a_run_that_fails_or_does_not_fit(tmp_path, stub):
    first, bad, large, unread = stub([0.01, 0.02, 0.03, 0.04], [40, 40, 101, 1])
    broken = bad.run.with_values({"data.train": "fails"}, "flag")
    bad = Planned(bad.trial, broken, bad.need)
    unread = Planned(unread.trial, unread.run, unread.need, 78, "nothing fits: lora needs 9 GB.")
    rows = sweep.run_sweep(
        tmp_path, [bad, first, large, unread], Machine(lambda: [Place("a", 100)])
    )
    assert [row.state for row in rows] == ["failed", "finished", "does not fit", "does not fit"]
    assert (rows[0].reason, rows[0].exit_code) == ("the rows are bad", 65)
    assert "no device has more than 0.0 MB free" in rows[2].reason
    assert rows[3].reason == "nothing fits: lora needs 9 GB."
    assert sweep.exit_code_of(rows) == 65
    assert sweep.exit_code_of(rows[1:]) == 0
    assert sweep.exit_code_of(rows[2:]) == 78
    found = ranking.rank(rows)
    assert found.winner == "run-1"
    assert found.results[0].name == "run-1"


def test_a_run_that_is_killed_again_and_again_has_failed(tmp_path, stub, monkeypatch):
    monkeypatch.setattr(sweep, "RETRY_SECONDS", 0.1)

    class Killing(Machine):
        def start(self, planned, out, *, at):
            handle = super().start(planned, out, at=at)
            handle.process.kill()
            return handle

    rows = sweep.run_sweep(tmp_path, stub([0.01], [1]), Killing(lambda: [Place("a", 1)]))
    assert (rows[0].state, rows[0].exit_code) == ("failed", 75)
    assert rows[0].reason == "killed by SIGKILL"


def test_a_run_whose_folder_is_held_waits_for_it(tmp_path, stub, monkeypatch):
    monkeypatch.setattr(sweep, "RETRY_SECONDS", 0.1)
    planned = stub([0.01], [1], steps=20)
    other = engine.start(
        planned[0].run, tmp_path, "run-1", environment={"NIBBLE_PLACE": "elsewhere"}
    )
    _wait_until(lambda: _used(tmp_path))

    class Blind(Machine):
        def at_work(self, out, names):
            return {}

    rows = sweep.run_sweep(tmp_path, planned, Blind(lambda: [Place("a", 1)]))
    assert other.process.wait() == 0
    assert rows[0].state == "finished"
    assert _num_finished(tmp_path) == 1


def test_a_run_whose_folder_holds_something_else_has_failed(tmp_path, stub, monkeypatch):
    monkeypatch.setattr(sweep, "RETRY_SECONDS", 0.1)
    (tmp_path / "run-1").mkdir()
    (tmp_path / "run-1" / "thesis.txt").touch()
    rows = sweep.run_sweep(tmp_path, stub([0.01], [1]), Machine(lambda: [Place("a", 1)]))
    assert (rows[0].state, rows[0].exit_code) == ("failed", 73)
    assert "holds something else" in rows[0].reason


@pytest.mark.parametrize("num_workers", [1, 3])
def test_halving_leaves_the_worse_half_behind_at_each_rung(tmp_path, stub, num_workers):
    planned = stub([0.03, 0.01, 0.04, 0.02, 0.05], [1] * 5, "train.eval_every=5", steps=20)
    machine = Machine(lambda: [Place("a", 100, most_runs=num_workers)])
    rows = sweep.run_sweep(tmp_path, planned, machine, rungs=[5, 10])
    found = {row.name: (row.state, row.lost_at) for row in rows}
    assert found == {
        "run-1": ("stopped early", 10),
        "run-2": ("stopped early", 5),
        "run-3": ("finished", None),
        "run-4": ("stopped early", 5),
        "run-5": ("finished", None),
    }
    results = ranking.rank(rows)
    assert [result.name for result in results.results] == [
        "run-5", "run-3", "run-1", "run-4", "run-2",
    ]  # fmt: skip
    assert results.named("run-2").eval_loss == pytest.approx(8 - 5 * 0.01)
    again = sweep.run_sweep(tmp_path, planned, machine, rungs=[5, 10])
    assert {row.name: (row.state, row.lost_at) for row in again} == found


def _children(out):
    return sorted(path.name for path in out.glob("run-*") if path.is_dir())


@pytest.mark.torture
def test_real_runs_on_two_workers_give_the_same_adapters(tmp_path, tiny_model_folder, is_torture):
    """`nibble sweep` killed twice with SIGKILL: the adapters have the digests of a whole sweep."""
    num_runs = 8 if is_torture else 2
    rows = [{"prompt": f"say {n}", "completion": f"{n}"} for n in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.yaml").write_text(
        f"method: lora\nmodel: {{name: {tiny_model_folder('llama')}}}\n"
        f"data: {{train: {tmp_path / 'rows.jsonl'}, eval: 0.2, max_seq_len: 64}}\n"
        "train: {steps: 20, batch_size: 4, micro_batch_size: 2, recompute: none, save_every: 5}\n"
        "optim: {paged: false}\n"
    )
    axis = "optim.lr=" + ",".join(str(1e-3 * n) for n in range(1, num_runs + 1))
    command = [sys.executable, "-m", "nibble", "sweep", str(tmp_path / "recipe.yaml")]
    command += ["--grid", axis, "--workers", "2", "--json"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}

    def start(out):
        return subprocess.Popen([*command, "--out", str(out)], env=env, **quiet)

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole).wait() == 0
    for num_begun in (1, num_runs // 2 + 1):
        process = start(killed)
        _wait_until(lambda n=num_begun: len(_children(killed)) >= n)
        process.kill()
        process.wait()
    assert start(killed).wait() == 0
    assert _table(killed) == _table(whole)
    assert _num_finished(killed) == _num_finished(whole) == num_runs
    digests = [tuple(row["sha256"].values()) for row in _table(killed)[0]]
    assert len({*digests}) == num_runs
    print(f"{num_runs} runs on two workers, the sweep killed twice: the same adapters")


def test_places_and_needs_of_a_sweep_that_goes_on_are_those_it_began_with(tmp_path, stub):
    planned = [
        Planned(one.trial, one.run.with_values({"train.micro_batch_size": 2}, "planner"), Need(7))
        for one in stub([0.01, 0.02], [1, 1])
    ]
    trials = [one.trial for one in planned]
    record.write_record(tmp_path, planned, has_halving=False)
    found = record.read_record(tmp_path, trials, has_halving=False)
    assert [one.need for one in found] == [Need(7), Need(7)]
    assert found[0].run.train.micro_batch_size == 2
