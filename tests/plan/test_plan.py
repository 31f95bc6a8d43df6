"""A plan: the model it is for, what it fills in, what it says of data and of past runs."""

import json
from dataclasses import replace

import pytest

import nibble
from nibble.errors import DoesNotFitError, NibbleError, UnavailableError, UsageError
from nibble.model.files import read_config
from nibble.plan.devices import find_device
from nibble.plan.plan import Charge, Plan, concrete, make_plan, model_values
from nibble.plan.presets import preset_config
from nibble.train.history import record

GB = 10**9


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def config(name, *overrides):
    return nibble.load_config(None, [f"model.name={name}", *overrides])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """40 different examples, a quarter of them longer than 64 tokens."""
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [
        {"prompt": f"{n:05}", "completion": "b" * (100 if n % 4 == 0 else 9)} for n in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class TestModel:
    def test_a_folder_has_its_own_values(self, tiny_model_folder):
        folder = tiny_model_folder("llama")
        assert model_values(config(folder)) == read_config(folder)

    @pytest.mark.parametrize("name", ["llama-2-7b", "meta-llama/Llama-2-7b-hf", "LLAMA-2-7B"])
    def test_a_preset_needs_no_folder(self, name):
        assert model_values(config(name)) == preset_config("llama-2-7b")

    def test_a_folder_goes_before_a_preset_of_its_name(
        self, tiny_model_folder, tmp_path, monkeypatch
    ):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "llama-2-7b").symlink_to(tiny_model_folder("llama"))
        assert model_values(config("llama-2-7b"))["hidden_size"] == 64

    @pytest.mark.parametrize(
        ("name", "close"), [("llama-2-7", "llama-2-7b"), ("Qwen/Qwen2.5-7", "Qwen/Qwen2.5-7B")]
    )
    def test_an_unknown_name_is_asked_back(self, name, close):
        with pytest.raises(NibbleError) as caught:
            model_values(config(name))
        assert isinstance(caught.value, UsageError | UnavailableError)
        assert caught.value.fix == f'did you mean "{close}"?'

    def test_a_name_like_no_other_keeps_its_own_fix(self):
        with pytest.raises(NibbleError) as caught:
            model_values(config("./xyzzy"))
        assert "did you mean" not in str(caught.value)
        assert caught.value.fix


SETTINGS = {
    "method": "qlora",
    "train.micro_batch_size": 4,
    "train.recompute": "selective",
    "optim.name": "adamw8bit",
    "optim.paged": True,
}


class TestConcrete:
    def test_what_is_open_is_filled_in_by_the_planner(self):
        run = concrete(config("m"), SETTINGS)
        assert {key: run.flat()[key] for key in SETTINGS} == SETTINGS
        assert {run.origin(key) for key in SETTINGS} == {"planner"}
        assert run.origin("model.name") == "flag"

    def test_what_was_asked_for_stays(self):
        asked = ("method=lora", "train.micro_batch_size=2", "train.recompute=full")
        optim = ("optim.name=adamw", "optim.paged=false")
        run = config("m", *asked, *optim)
        assert concrete(run, SETTINGS).flat() == run.flat()
        assert {concrete(run, SETTINGS).origin(key) for key in SETTINGS} == {"flag"}

    def test_auto_that_was_written_out_is_open_all_the_same(self):
        run = concrete(config("m", "method=auto"), SETTINGS)
        assert (run.method, run.origin("method")) == ("qlora", "planner")

    def test_a_default_that_is_kept_stays_a_default(self):
        run = concrete(config("m"), {**SETTINGS, "optim.name": "adamw"})
        assert run.origin("optim.name") == "default"


@pytest.fixture(scope="module")
def planned(own_cache, tiny_model_folder, data):
    run = config(
        tiny_model_folder("llama"),
        f"data.train={data}",
        f"data.eval={data}",
        "data.max_seq_len=64",
        "method=lora",
        "train.recompute=none",
        "train.micro_batch_size=4",
        "train.epochs=2",
    )
    return run, *make_plan(run, "T4")


class TestData:
    def test_the_data_is_read_once_and_summed_up(self, planned):
        _, plan, dataset = planned
        report = dataset.report.train
        assert plan.data.num_documents == report.num_documents == 40
        assert plan.data.num_tokens == report.num_tokens
        assert plan.data.num_rows == report.num_rows == len(dataset.train)
        assert plan.data.packing_efficiency == report.packing_efficiency
        assert sum(plan.data.num_by_length.values()) == report.num_documents
        assert plan.data.num_by_length.keys() <= {16, 32, 64, 128}

    def test_the_share_that_is_cut_is_that_of_the_examples_read(self, planned):
        _, plan, dataset = planned
        report = dataset.report.train
        assert plan.data.share_cut == {64: report.num_truncated / report.num_read}
        assert 0 < plan.data.share_cut[64] < 0.5

    def test_the_largest_pass_is_within_its_rows(self, planned):
        _, plan, _ = planned
        assert 64 < plan.data.longest_pass_tokens <= 4 * 64

    def test_it_has_times_phases_and_parts(self, planned):
        run, plan, dataset = planned
        steps = 2 * -(-len(dataset.train) // run.train.batch_size)
        assert plan.total_seconds == pytest.approx(steps * plan.step_seconds)
        assert plan.fits
        assert {"load", "forward", "backward", "optimizer", "eval"} <= plan.phases.keys()
        peak = max(size for phase, size in plan.phases.items() if phase != "merge")
        assert sum(plan.parts.values()) == peak <= plan.peak_memory_bytes

    def test_parts_of_the_layers_may_fit_where_the_whole_does_not(self, planned):
        _, plan, _ = planned
        layers = plan.parts["base in 16 bits"]
        short = replace(plan, budget_bytes=plan.needed_bytes - layers // 2)
        assert not short.fits_in_shards(1)
        assert short.fits_in_shards(2)
        assert not replace(short, budget_bytes=short.budget_bytes - layers).fits_in_shards(64)

    def test_it_is_plain_values(self, planned):
        _, plan, _ = planned
        values = plan.to_dict()
        text = json.loads(json.dumps(values))
        assert text["data"]["num_rows"] == plan.data.num_rows
        assert values.keys() == Plan.__dataclass_fields__.keys()


@pytest.fixture(scope="module")
def unread(own_cache):
    return _unread()


def _unread(*more):
    run = config(
        "llama-3.2-1b",
        *more,
        "data.train=none.jsonl",
        "data.max_seq_len=512",
        "method=qlora",
        "train.recompute=none",
        "train.micro_batch_size=1",
        "optim.paged=false",
        "train.steps=100",
    )
    return make_plan(run, "T4", charge=Charge(2.0, "1h"))


class TestPresetWithoutFolder:
    def test_data_is_passed_over_and_that_is_said(self, unread):
        made, dataset = unread
        assert (made.data, dataset) == (None, None)
        assert any("data was not read" in reason for reason in made.reasons)

    def test_the_method_that_was_asked_for_has_no_runner_up(self, unread):
        made, _ = unread
        assert (made.method, made.runner_up, made.changes) == ("qlora", None, [])
        assert made.settings["train.recompute"] == "none"

    def test_begun_hours_are_paid_whole(self, unread):
        made, _ = unread
        assert made.total_seconds == pytest.approx(100 * made.step_seconds)
        assert made.cost == 2.0 * -(-made.total_seconds // 3600)

    def test_the_adapter_and_the_checkpoints_go_to_disk(self, unread):
        """Two are kept while one is written; with held-out rows the best is kept as well."""
        for num_checkpoints, (made, _) in ((3, unread), (4, _unread("data.eval=0.1"))):
            adapter, moments = 4 * made.num_trainable, 8 * made.num_trainable
            expected = num_checkpoints * (moments + adapter) + adapter
            assert made.disk_bytes == pytest.approx(expected, rel=1e-3)


SMALL = (
    "method=lora",
    "data.max_seq_len=64",
    "train.recompute=none",
    "train.micro_batch_size=1",
    "optim.paged=false",
)


class TestLearning:
    @pytest.fixture(autouse=True)
    def empty_cache(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def test_past_runs_correct_the_peak_and_are_named(self, tiny_model_folder):
        run = config(tiny_model_folder("llama"), *SMALL)
        before, _ = make_plan(run, "T4")
        for measured in (11, 12, 13):
            record("T4", "lora", "m", predicted=10 * GB, measured=measured * GB, is_comparable=True)
        after, _ = make_plan(run, "T4")
        assert before.peak_memory_bytes == before.uncorrected_peak_memory_bytes
        assert after.peak_memory_bytes == round(1.2 * before.peak_memory_bytes)
        assert after.uncorrected_peak_memory_bytes == pytest.approx(before.peak_memory_bytes, abs=1)
        added = after.parts.pop("learned correction")
        assert added == after.peak_memory_bytes - before.peak_memory_bytes
        assert after.parts == before.parts
        for name, size in before.phases.items():
            assert after.phases[name] == pytest.approx(1.2 * size, abs=1)
        [learned] = [reason for reason in after.reasons if "Learned correction" in reason]
        assert "1.20 times" in learned

    def test_runs_on_other_devices_teach_nothing(self, tiny_model_folder):
        run = config(tiny_model_folder("llama"), *SMALL)
        for _ in range(3):
            record("A10", "lora", "m", predicted=10 * GB, measured=20 * GB, is_comparable=True)
        plan, _ = make_plan(run, "T4")
        assert plan.peak_memory_bytes == plan.uncorrected_peak_memory_bytes
        assert not any("Learned" in reason for reason in plan.reasons)


class TestDevice:
    def test_a_plan_that_does_not_fit_is_an_error_with_ways_out(self, tiny_model_folder):
        tight = replace(find_device("T4"), memory_bytes=2**29 + 2**21)
        run = config(tiny_model_folder("llama"), *SMALL)
        plan, _ = make_plan(run, tight)
        error = plan.error()
        assert not plan.fits
        assert isinstance(error, DoesNotFitError)
        assert error.exit_code == 78
        assert error.what == " ".join(plan.reasons)
        assert all(change in error.fix for change in plan.changes)
        assert plan.changes
        assert "--anyway" in error.fix

    def test_the_cpu_offers_what_is_free(self, tiny_model_folder, monkeypatch):
        monkeypatch.setattr("nibble.plan.plan.available_bytes", lambda device: 3 * GB)
        plan, _ = make_plan(config(tiny_model_folder("llama"), *SMALL), "cpu")
        assert plan.budget_bytes == 3 * GB
        assert plan.step_seconds > 0
        assert plan.cost is None

    def test_an_unknown_device_is_refused(self, tiny_model_folder):
        with pytest.raises(UsageError, match="unknown device"):
            make_plan(config(tiny_model_folder("llama")), "RTX 4900")
