"""Plans and what came of them: one line a run, and a ratio where there are enough."""

import json
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nibble.train import history
from nibble.train.history import (
    FEWEST_RUNS,
    MOST_RUNS,
    SMALLEST_BYTES,
    history_file,
    read_history,
    record,
    summary,
)

GB = 10**9
GOOD = {
    "device": "RTX 4090",
    "method": "lora",
    "model": "m",
    "predicted_bytes": GB,
    "measured_bytes": 2 * GB,
    "is_comparable": True,
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def entries(ratios, device="RTX 4090"):
    return [{**GOOD, "device": device, "measured_bytes": ratio * GB} for ratio in ratios]


class TestFile:
    def test_runs_come_back_in_their_order(self, cache):
        record("RTX 4090", "lora", "m", predicted=GB, measured=2 * GB, is_comparable=True)
        record("RTX 4090", "qlora", "ü", predicted=3 * GB, measured=GB, is_comparable=True)
        first, second = read_history()
        assert first == GOOD
        assert (second["method"], second["model"], second["measured_bytes"]) == ("qlora", "ü", GB)
        assert history_file() == cache / "nibble" / "plan_history.jsonl"

    def test_small_runs_are_not_remembered(self, cache):
        record("cpu", "lora", "m", predicted=SMALLEST_BYTES - 1, measured=GB, is_comparable=True)
        assert not history_file().exists()
        record("cpu", "lora", "m", predicted=SMALLEST_BYTES, measured=GB, is_comparable=True)
        assert len(read_history()) == 1

    def test_without_a_file_there_is_nothing(self):
        assert read_history() == []

    def test_a_cache_that_takes_nothing_is_silent(self, cache, monkeypatch):
        (cache / "file").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache / "file"))
        record("cpu", "lora", "m", predicted=GB, measured=GB, is_comparable=True)
        assert read_history() == []

    def test_a_folder_in_its_place_is_silent(self, cache):
        history_file().mkdir(parents=True)
        record("cpu", "lora", "m", predicted=GB, measured=GB, is_comparable=True)
        assert read_history() == []

    def test_no_home_is_silent(self, monkeypatch):
        def no_home():
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(history.Path, "home", no_home)
        record("cpu", "lora", "m", predicted=GB, measured=GB, is_comparable=True)
        assert read_history() == []

    @pytest.mark.parametrize(
        "line",
        [
            "",
            "{",
            "null",
            "7",
            "[]",
            '"text"',
            "{}",
            "\0",
            json.dumps({**GOOD, "predicted_bytes": 0}),
            json.dumps({**GOOD, "measured_bytes": -1}),
            json.dumps({**GOOD, "measured_bytes": "many"}),
            json.dumps({**GOOD, "measured_bytes": float("nan")}),
            json.dumps({**GOOD, "device": None}),
            json.dumps({key: value for key, value in GOOD.items() if key != "method"}),
            "9" * 5000,
        ],
    )
    def test_lines_that_are_none_are_passed_over(self, line):
        history_file().parent.mkdir()
        good = json.dumps(GOOD)
        history_file().write_text(f"{good}\n{line}\n{good}\n", encoding="utf-8")
        assert read_history() == [GOOD, GOOD]

    def test_a_half_written_line_costs_one_more(self):
        record("RTX 4090", "lora", "m", predicted=GB, measured=2 * GB, is_comparable=True)
        with history_file().open("a") as file:
            file.write('{"device": "RTX')
        for _ in range(2):
            record("RTX 4090", "lora", "m", predicted=GB, measured=2 * GB, is_comparable=True)
        assert read_history() == [GOOD, GOOD]

    def test_a_file_that_is_no_text_is_passed_over(self):
        history_file().parent.mkdir()
        history_file().write_bytes(b"\xff\xfe\x00")
        assert read_history() == []


class TestSummary:
    def test_few_runs_give_no_ratio(self):
        assert summary([]) == {}
        assert summary(entries([1.1] * (FEWEST_RUNS - 1))) == {}
        assert summary(entries([1.1] * FEWEST_RUNS)) == {"RTX 4090": pytest.approx(1.1)}

    def test_devices_are_counted_apart(self):
        records = entries([1.0, 1.2, 3.0]) + entries([0.9] * 2, device="T4")
        assert summary(records) == {"RTX 4090": pytest.approx(1.2)}

    def test_only_the_last_runs_count(self):
        records = entries([9.0] * 200) + entries([1.0] * MOST_RUNS)
        assert summary(records) == {"RTX 4090": 1.0}

    @given(st.lists(st.floats(0.1, 10), min_size=FEWEST_RUNS, max_size=MOST_RUNS))
    def test_it_is_the_median(self, ratios):
        assert summary(entries(ratios))["RTX 4090"] == pytest.approx(median(ratios))

    def test_only_runs_that_went_as_planned_count(self):
        halved = [{**entry, "is_comparable": False} for entry in entries([9.0] * 9)]
        assert summary(halved) == {}
        assert summary([*halved, *entries([1.1] * FEWEST_RUNS)]) == {"RTX 4090": 1.1}
