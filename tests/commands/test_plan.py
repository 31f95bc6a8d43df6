"""`nibble plan` as a person uses it."""

import io
import json
from contextlib import redirect_stderr, redirect_stdout

import pytest

from nibble.commands.main import main
from nibble.train.history import record

GB = 10**9
PRESET = ("--model", "llama-3.2-1b")
KEYS = {
    "version",
    "model",
    "device",
    "method",
    "fits",
    "peak_memory_bytes",
    "budget_bytes",
    "phases",
    "parts",
    "settings",
    "step_seconds",
    "total_seconds",
    "cost",
    "reasons",
    "runner_up",
}
# A run with one way to go: the quickest to plan.
DECIDED = [
    word
    for value in (
        "method=lora",
        "data.max_seq_len=64",
        "train.recompute=none",
        "train.micro_batch_size=1",
        "optim.paged=false",
        "train.steps=1000",
    )
    for word in ("--set", value)
]


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def call(*words):
    """Exit code, standard output and standard error of `nibble plan`."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as stop:
        main(["plan", *words])
    assert "Traceback" not in err.getvalue()
    return stop.value.code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def values(own_cache):
    code, text, err = call(*PRESET, "--memory", "24GiB", "--json")
    assert (code, err) == (0, "")
    return json.loads(text)


class TestRoom:
    def test_every_figure_is_there(self, values):
        assert values.keys() >= KEYS
        assert (values["version"], values["model"]) == (1, "llama-3.2-1b")
        assert values["device"] == "a GPU of 24 GiB"
        assert (values["fits"], values["method"]) == (True, "lora")
        assert values["peak_memory_bytes"] <= values["budget_bytes"] < 24 * 2**30
        assert values["changes"] == []

    def test_parts_add_up_to_the_highest_phase(self, values):
        highest = max(size for phase, size in values["phases"].items() if phase != "merge")
        assert sum(values["parts"].values()) == pytest.approx(highest, rel=0.01)
        assert values["peak_memory_bytes"] == pytest.approx(highest, rel=0.01)

    def test_settings_leave_nothing_open(self, values):
        settings = values["settings"]
        assert settings["method"] == values["method"]
        assert "auto" not in settings.values()
        assert settings.keys() >= {"train.micro_batch_size", "train.recompute", "optim.paged"}

    def test_the_other_method_is_the_runner_up(self, values):
        other = values["runner_up"]
        assert other["method"] == "qlora"
        assert "memory" in other["difference"]
        assert values["reasons"][0].startswith("lora: the base fits in 16 bits")

    def test_times_of_an_unnamed_gpu_are_unknown(self, values):
        found = {values[key] for key in ("step_seconds", "total_seconds", "cost")}
        assert found == {None}


@pytest.fixture(scope="module")
def tight(own_cache):
    return call(*PRESET, "--memory", "1GiB", "--json")


class TestNoRoom:
    def test_the_exit_code_says_so(self, tight):
        code, text, _ = tight
        values = json.loads(text)
        assert (code, values["fits"]) == (78, False)
        assert values["peak_memory_bytes"] > values["budget_bytes"]

    def test_changes_say_what_would_fit(self, tight):
        changes = json.loads(tight[1])["changes"]
        assert 2 <= len(changes) <= 4
        assert any("GiB" in change for change in changes)


@pytest.fixture(scope="module")
def answer(own_cache, tiny_model_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("plot") / "plan.png"
    words = ["--model", str(tiny_model_folder("llama")), "--device", "T4", *DECIDED]
    code, text, err = call(*words, "--price", "2", "--billing", "1h", "--plot", str(path))
    assert (code, err) == (0, "")
    return text, path


class TestForPeople:
    def test_a_sentence_says_that_it_fits(self, answer):
        first = answer[0].splitlines()[0]
        assert first.endswith("on T4: lora fits")

    def test_the_table_has_settings_memory_time_and_cost(self, answer):
        text, _ = answer
        assert "1 row a pass, recompute none, adamw" in text
        for words in ("memory", "trained", "s a step", "in all", "2.00 USD", "disk", "why"):
            assert words in text
        assert "what would fit" not in text

    def test_the_plot_is_a_png(self, answer):
        content = answer[1].read_bytes()
        assert content.startswith(b"\x89PNG\r\n\x1a\n")
        assert len(content) > 5000

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("none/plan.png", "there is no folder"),
            ("plan.doc", "ends in .png"),
            ("plan", "ends in"),
        ],
    )
    def test_a_plot_that_cannot_be_written_is_refused_at_once(
        self, tmp_path, monkeypatch, name, message
    ):
        monkeypatch.setattr("nibble.plan.plan.make_plan", lambda *a, **k: pytest.fail("planned"))
        code, text, err = call(
            "--model", "llama-2-7b", "--device", "T4", "--plot", str(tmp_path / name)
        )
        assert (code, text) == (2, "")
        assert message in err
        assert "fix:" in err

    def test_what_does_not_fit_has_its_ways_out(self, tiny_model_folder):
        words = ["--model", str(tiny_model_folder("llama")), "--memory", "513MiB", *DECIDED]
        code, text, _ = call(*words)
        assert code == 78
        assert "lora does not fit" in text
        assert "what would fit" in text


class TestRefused:
    @pytest.mark.parametrize(
        ("words", "codes", "messages"),
        [
            ((*PRESET, "--device", "RTX 4900"), {2}, ('did you mean "RTX 4090"', "RTX 4900")),
            ((*PRESET, "--memory", "24"), {2}, ("has no unit", "24GiB")),
            ((*PRESET, "--memory", "L4"), {2}, ("not an amount",)),
            ((*PRESET, "--device", "L4", "--memory", "24GiB"), {2}, ("exclude each other",)),
            (("--memory", "24GiB"), {2}, ("model.name is not set",)),
            (
                ("--model", "llama-3.2-1c", "--memory", "24GiB"),
                {2},
                ('did you mean "llama-3.2-1b"',),
            ),
            (("--model", "./none", "--memory", "24GiB"), {2}, ("no such folder",)),
        ],
    )
    def test_with_the_reason_and_a_way_out(self, words, codes, messages):
        code, text, err = call(*words)
        assert code in codes
        assert text == ""
        assert all(message in err for message in (*messages, "fix:"))

    def test_a_billing_that_is_no_time(self, tiny_model_folder):
        words = ["--model", str(tiny_model_folder("llama")), "--device", "T4", *DECIDED]
        code, _, err = call(*words, "--billing", "fortnight")
        assert code == 2
        assert "--billing 'fortnight' is no time" in err


class TestHistory:
    @pytest.fixture(autouse=True)
    def empty_cache(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def test_without_runs_it_says_so(self):
        assert call("--history") == (0, "no finished run on this machine yet\n", "")
        assert json.loads(call("--history", "--json")[1]) == {
            "version": 1,
            "runs": [],
            "summary": {},
        }

    def test_runs_that_are_not_comparable_are_named(self):
        record("T4", "lora", "m", predicted=10 * GB, measured=GB, is_comparable=False)
        assert call("--history")[1].endswith("(-90.0%)  not counted\n")

    def test_runs_and_how_right_their_plans_were(self):
        for measured in (9, 11, 12):
            record(
                "T4",
                "qlora",
                "llama-3.2-1b",
                predicted=10 * GB,
                measured=measured * GB,
                is_comparable=True,
            )
        code, text, _ = call("--history")
        lines = text.splitlines()
        assert (code, len(lines)) == (0, 4)
        assert "predicted 10.0 GB, measured 9.0 GB (-10.0%)" in lines[0]
        assert lines[-1] == "T4: measured over predicted 1.100 in the median"
