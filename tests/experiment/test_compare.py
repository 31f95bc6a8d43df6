"""What is run, resumed, refused; the runs are stand-ins that end as they are told."""

import json
import subprocess
import sys
import time
from contextlib import closing

import pytest

from nibble.errors import DataError, FolderInUseError, UsageError
from nibble.events import EventLog, RunEnd
from nibble.experiment import compare, engine

WORDS = ["model.name=some/model", "data.eval=0.5", "train.steps=10"]
REFUSED = "nibble: nothing fits: it needs 90 GB\n  fix: lora.rank=8; or try it --anyway\n"
FAILED = "nibble: step 3: the loss is nan\n  fix: lower optim.lr\n"


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n')
    return path


@pytest.fixture
def read(rows):
    """Makes a comparison from overrides."""

    def make(*more, **options):
        return compare.read_comparison(None, [*WORDS, f"data.train={rows}", *more], **options)

    return make


@pytest.fixture
def runs(monkeypatch):
    """Stand-ins for runs: by name what they say and their exit code; lists what was started."""
    ends: dict[str, tuple[str, int]] = {}
    started: list[tuple[str, object]] = []

    def start(run, place, name):
        started.append((name, run))
        said, code = ends.get(name, ("", 0))
        (place / name).mkdir(exist_ok=True)
        log = place / f"{name}.log"
        log.write_text(said)
        if code == 0:
            with closing(EventLog(place / name / "events.jsonl")) as events:
                events(RunEnd("finished", 1.0, 10, 1000))
        process = subprocess.Popen([sys.executable, "-c", f"raise SystemExit({code})"])
        return engine.Started(process, place / name, log, time.monotonic())

    monkeypatch.setattr(engine, "start", start)
    return ends, started


def measured(out, general):
    return {"of": out.name, "general": general}


def go(comparison, place, **options):
    return compare.compare(comparison, place, measure=measured, **options)


class TestRead:
    def test_methods_stand_in_one_order_with_seeds_that_count_up(self, read):
        found = read("train.seed=5", methods=["full", "lora"], num_seeds=2)
        assert (list(found.runs), found.seeds) == (["lora", "full"], [5, 6])
        assert found.run("full", 6).train.seed == 6
        assert found.run("full", 6).method == "full"

    def test_everything_else_is_equal(self, read):
        found = read("lora.rank=4", "optim.lr=1e-3", "full:optim.lr=1e-4")
        flats = [run.flat() for run in found.runs.values()]
        differing = {key for key in flats[0] if len({str(flat[key]) for flat in flats}) > 1}
        # full has no use for a rank, and would warn of it.
        assert differing == {"method", "optim.lr", "lora.rank"}
        assert [flat["optim.lr"] for flat in flats] == [1e-3, 1e-3, 1e-4]

    def test_a_plan_may_not_choose_another_optimizer(self, read):
        assert read().runs["full"].origin("optim.name") != "default"

    def test_rows_are_held_out_without_being_asked(self, rows):
        words = ["model.name=some/model", f"data.train={rows}"]
        found = compare.read_comparison(None, words, methods=["lora"])
        assert found.runs["lora"].data.eval == compare.EVAL_FRACTION

    @pytest.mark.parametrize(
        ("more", "options", "message"),
        [
            ((), {"methods": ["qlor"]}, 'did you mean "qlora"'),
            ((), {"methods": []}, "expected different methods"),
            ((), {"methods": ["lora", "lora"]}, "expected different methods"),
            ((), {"num_seeds": 0}, "at least 1"),
            (("method=lora",), {}, "give --methods"),
            (("lora:out=x",), {}, "give --out"),
            (("qlora:lora.rank=2",), {"methods": ["lora"]}, "not among the methods"),
            (("lora:lora.rnk=2",), {}, 'did you mean "lora.rank"'),
        ],
    )
    def test_what_is_wrong_is_refused(self, read, more, options, message):
        with pytest.raises(UsageError) as refused:
            read(*more, **options)
        assert message in str(refused.value)


class TestRuns:
    def test_methods_take_turns_and_each_run_is_measured_after_the_last(self, read, runs, tmp_path):
        seen = []
        general = tmp_path / "g.txt"
        general.write_text("x")
        found = compare.compare(
            read(num_seeds=2, general=str(general)),
            tmp_path / "out",
            measure=lambda out, general: seen.append(len(runs[1])) or measured(out, general),
        )
        order = [f"{m}-seed{s}" for s in (0, 1) for m in ("lora", "qlora", "full")]
        assert [name for name, _ in runs[1]] == order
        assert seen == [6] * 6
        assert all(record.is_finished for record in found.values())
        assert found["qlora", 1].measured == {"of": "qlora-seed1", "general": str(general)}
        assert found["qlora", 1].seconds > 0

    def test_again_nothing_is_run_or_measured_and_the_same_is_found(self, read, runs, tmp_path):
        first = go(read(num_seeds=1), tmp_path / "out")
        runs[1].clear()
        again = compare.compare(read(num_seeds=1), tmp_path / "out", measure=pytest.fail)
        assert (again, runs[1]) == (first, [])

    def test_seeds_and_methods_can_be_added(self, read, runs, tmp_path):
        go(read(num_seeds=1, methods=["lora"]), tmp_path / "out")
        runs[1].clear()
        found = go(read(num_seeds=2, methods=["lora", "qlora"]), tmp_path / "out")
        assert [name for name, _ in runs[1]] == ["qlora-seed0", "lora-seed1", "qlora-seed1"]
        assert len(found) == 4
        runs[1].clear()
        go(read(num_seeds=1, methods=["lora"]), tmp_path / "out")
        go(read(num_seeds=2, methods=["lora", "qlora"]), tmp_path / "out")
        assert runs[1] == []

    def test_what_does_not_fit_is_not_tried_again_within_a_comparison(self, read, runs, tmp_path):
        ends, started = runs
        ends["full-seed0"] = (REFUSED, 78)
        found = go(read(num_seeds=2), tmp_path / "out")
        assert "full-seed1" not in [name for name, _ in started]
        for seed in (0, 1):
            record = found["full", seed]
            assert (record.is_too_large, record.is_failed) == (True, False)
            assert record.reason == "nothing fits: it needs 90 GB"
            assert record.fix.startswith("lora.rank=8")

    def test_a_failed_run_stops_no_other_and_is_tried_again(self, read, runs, tmp_path):
        ends, started = runs
        ends["lora-seed0"] = (FAILED, 76)
        found = go(read(num_seeds=2, methods=["lora", "qlora"]), tmp_path / "out")
        assert [r.exit_code for r in found.values()] == [76, 0, 0, 0]
        assert (found["lora", 0].reason, found["lora", 0].fix) == (
            "step 3: the loss is nan", "lower optim.lr",
        )  # fmt: skip
        ends.clear()
        started.clear()
        found = go(read(num_seeds=2, methods=["lora", "qlora"]), tmp_path / "out")
        assert [name for name, _ in started] == ["lora-seed0"]
        assert found["lora", 0].is_finished

    def test_a_run_that_was_killed_can_go_on(self, read, runs, tmp_path):
        runs[0]["lora-seed0"] = ("", "__import__('os').kill(__import__('os').getpid(), 9)")
        found = go(read(num_seeds=1, methods=["lora"]), tmp_path / "out")
        record = found["lora", 0]
        assert (record.exit_code, record.reason) == (75, "killed by SIGKILL")
        assert record.is_failed

    def test_whoever_watches_may_stop_it_and_the_run_is_stopped(self, read, runs, tmp_path):
        def stop(progress):
            if progress.record is not None:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            go(read(num_seeds=1), tmp_path / "out", watch=stop)
        assert [name for name, _ in runs[1]] == ["lora-seed0"]
        go(read(num_seeds=1), tmp_path / "out")
        assert [name for name, _ in runs[1]] == ["lora-seed0", "qlora-seed0", "full-seed0"]

    def test_measuring_that_fails_loses_no_run(self, read, runs, tmp_path):
        def broken(out, general):
            raise DataError("no such text", path="g.txt")

        with pytest.raises(DataError):
            compare.compare(read(num_seeds=1), tmp_path / "out", measure=broken)
        runs[1].clear()
        assert all(r.measured for r in go(read(num_seeds=1), tmp_path / "out").values())
        assert runs[1] == []


class TestPlace:
    def test_something_else_is_left_alone(self, read, runs, tmp_path):
        place = tmp_path / "out"
        place.mkdir()
        (place / "thesis.txt").write_text("x")
        with pytest.raises(FolderInUseError, match=r"thesis\.txt"):
            go(read(), place)
        assert {path.name for path in place.iterdir()} <= {"thesis.txt", ".lock"}

    @pytest.mark.parametrize("change", ["lora.rank=4", "qlora:optim.lr=1e-3", "train.seed=1"])
    def test_another_comparison_is_refused(self, read, runs, tmp_path, change):
        go(read(num_seeds=1), tmp_path / "out")
        before = (tmp_path / "out" / "compare.json").read_bytes()
        with pytest.raises(FolderInUseError) as refused:
            go(read(change, num_seeds=1), tmp_path / "out")
        assert change.rpartition(":")[2].partition("=")[0] in str(refused.value)
        assert (tmp_path / "out" / "compare.json").read_bytes() == before

    def test_before_anything_was_trained_a_wrong_path_can_be_corrected(
        self, read, rows, runs, tmp_path
    ):
        runs[0].update({"lora-seed0": ("", 65), "qlora-seed0": ("", 65)})
        wrong = read("data.train=wrong.jsonl", num_seeds=1, methods=["lora", "qlora"])
        go(wrong, tmp_path / "out")
        runs[0].clear()
        assert go(read(num_seeds=1, methods=["lora"]), tmp_path / "out")["lora", 0].is_finished
        both = go(read(num_seeds=1, methods=["lora", "qlora"]), tmp_path / "out")
        assert both["qlora", 0].is_finished
        with pytest.raises(FolderInUseError, match=r"data\.train"):
            go(wrong, tmp_path / "out")

    def test_other_data_in_the_same_file_is_refused(self, read, rows, runs, tmp_path):
        go(read(num_seeds=1), tmp_path / "out")
        rows.write_text('{"prompt": "c", "completion": "d"}\n')
        with pytest.raises(FolderInUseError, match=r"rows\.jsonl has changed"):
            go(read(num_seeds=1), tmp_path / "out")

    def test_another_process_holds_it(self, read, runs, tmp_path):
        def inside(progress):
            with pytest.raises(FolderInUseError):
                go(read(num_seeds=1), tmp_path / "out")

        go(read(num_seeds=1), tmp_path / "out", watch=inside)

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"exit_code": 0}', "\xff"])
    def test_a_broken_record_of_a_finished_run_is_written_anew(self, read, runs, tmp_path, text):
        go(read(num_seeds=1, methods=["lora"]), tmp_path / "out")
        (tmp_path / "out" / "lora-seed0.json").write_text(text, encoding="latin-1")
        found = go(read(num_seeds=1, methods=["lora"]), tmp_path / "out")
        assert found["lora", 0].seconds is None
        assert found["lora", 0].measured


def test_the_last_step_is_read_off_the_end_of_a_log(tmp_path):
    path = tmp_path / "events.jsonl"
    assert compare._last_step(path) == 0
    lines = [json.dumps({"event": "step", "time": 0, "step": n, "x": "y" * 50}) for n in range(300)]
    path.write_text("\n".join([*lines, '{"event": "eval", "step": 7}', '{"event": "step", "st']))
    assert compare._last_step(path) == 299
