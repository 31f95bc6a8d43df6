"""The rows of a plan: the largest pass of the run, as the loader will make it."""

import json
import math
import random

import pytest

import nibble
from nibble.data.dataset import build_dataset
from nibble.data.loader import Loader, eval_batches
from nibble.model.tokenizer import load_tokenizer
from nibble.plan import rows as module
from nibble.plan.rows import Rows, full_rows, rows_of


def config(*overrides):
    return nibble.load_config(None, ["model.name=x", "data.max_seq_len=64", *overrides])


@pytest.fixture(scope="module")
def tokenizer(tiny_model_folder):
    return load_tokenizer(tiny_model_folder("llama"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """60 examples of 1 to 30 letters: rows that packing cannot fill evenly."""
    random.seed(0)
    examples = [
        {"prompt": "a" * random.randint(1, 10), "completion": "b" * random.randint(1, 20)}
        for _ in range(60)
    ]
    path = tmp_path_factory.mktemp("rows") / "train.jsonl"
    path.write_text("".join(json.dumps(example) + "\n" for example in examples))
    return path


class TestFullRows:
    def test_each_row_is_one_document_of_the_longest_length(self):
        rows = full_rows(config("train.batch_size=5", "train.steps=7"))
        assert rows.worst == {1: (64,), 2: (64, 64), 4: (64,) * 4}
        assert (rows.num_steps, rows.mean_row_tokens, rows.target_share) == (7, 64, 1.0)

    def test_of_a_number_of_rows_that_is_set_and_of_one_row(self):
        assert list(full_rows(config("train.micro_batch_size=3")).worst) == [1, 3]
        assert list(full_rows(config("train.micro_batch_size=1")).worst) == [1]

    def test_steps_without_data_are_known_only_where_they_are_set(self):
        assert full_rows(config()).num_steps is None

    def test_evaluation_fills_its_batch(self):
        assert full_rows(config()).eval_documents == ()
        assert full_rows(config("data.eval=x.jsonl")).eval_documents == (64,) * 64
        long = full_rows(config("data.eval=x.jsonl", "data.max_seq_len=8192"))
        assert long.eval_documents == (8192,)


class TestRowsOfData:
    @pytest.mark.parametrize("packing", ["true", "false"])
    @pytest.mark.parametrize(
        ("batch_size", "steps"),
        [(8, "train.epochs=2"), (5, "train.steps=3"), (16, "train.steps=1")],
    )
    def test_the_worst_pass_is_that_of_the_loader(
        self, tokenizer, data, packing, batch_size, steps
    ):
        run = config(
            f"data.train={data}",
            f"data.packing={packing}",
            f"train.batch_size={batch_size}",
            "train.seed=3",
            steps,
        )
        dataset = build_dataset(run.data, tokenizer, seed=run.train.seed)
        rows = rows_of(dataset, run)
        assert list(rows.worst) == [2**n for n in range(5) if 2**n <= batch_size]
        for size, documents in rows.worst.items():
            loader = Loader(dataset.train, batch_size=batch_size, micro_batch_size=size, seed=3)
            num_steps = run.train.steps or math.ceil(2 * loader.steps_per_epoch)
            assert rows.num_steps == num_steps
            passes = [batch for step in range(num_steps) for batch in loader.micro_batches(step)]
            largest = max(passes, key=lambda batch: batch.input_ids.numel())
            assert sum(documents) == largest.input_ids.numel()
            assert documents == tuple(largest.cu_seq_lens.diff().tolist())

    def test_fractions_of_an_epoch_are_rounded_up(self, tokenizer, data):
        run = config(f"data.train={data}", "data.packing=false", "train.epochs=0.1")
        dataset = build_dataset(run.data, tokenizer, seed=0)
        assert rows_of(dataset, run).num_steps == math.ceil(0.1 * math.ceil(60 / 16))

    def test_averages_are_over_all_rows(self, tokenizer, data):
        run = config(f"data.train={data}")
        dataset = build_dataset(run.data, tokenizer, seed=0)
        rows, report = rows_of(dataset, run), dataset.report.train
        assert rows.mean_row_tokens == report.num_tokens / report.num_rows
        assert rows.target_share == report.num_target_tokens / report.num_tokens
        assert 0 < rows.target_share < 1

    def test_the_largest_evaluation_batch(self, tokenizer, data, monkeypatch):
        monkeypatch.setattr(module, "EVAL_TOKENS", 100)
        run = config(f"data.train={data}", "data.eval=0.5")
        dataset = build_dataset(run.data, tokenizer, seed=0)
        documents = rows_of(dataset, run).eval_documents
        sizes = [batch.input_ids.numel() for batch in eval_batches(dataset.eval, max_tokens=100)]
        assert len(sizes) > 1
        assert sum(documents) == max(sizes)

    def test_without_held_out_data_there_is_none(self, tokenizer, data):
        run = config(f"data.train={data}")
        dataset = build_dataset(run.data, tokenizer, seed=0)
        assert rows_of(dataset, run).eval_documents == ()

    def test_no_more_rows_a_pass_than_there_are(self, tokenizer, tmp_path):
        data = tmp_path / "few.jsonl"
        data.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
        run = config(f"data.train={data}")
        rows = rows_of(build_dataset(run.data, tokenizer, seed=0), run)
        assert list(rows.worst) == [1]
        assert rows.rows_per_step(run.train.batch_size) == 1


def rows(num_rows, worst=None):
    return Rows(worst or {1: (64,)}, (), num_rows, None, 64)


class TestSteps:
    @pytest.mark.parametrize("num_rows", [1, 5, 16, 17, 40])
    @pytest.mark.parametrize("size", [1, 3, 4, 16])
    def test_the_short_step_at_the_end_of_an_epoch_counts_as_what_it_is(self, num_rows, size):
        steps = [min(16, num_rows - at) for at in range(0, num_rows, 16)]
        passes = [math.ceil(left / size) for left in steps]
        assert rows(num_rows).rows_per_step(16) == pytest.approx(sum(steps) / len(steps))
        assert rows(num_rows).passes_per_step(16, size) == pytest.approx(sum(passes) / len(steps))


class TestCut:
    def test_no_row_is_longer(self):
        cut = rows(8, {1: (50, 14), 2: (50, 14, 60)}).cut(32)
        assert cut.worst == {1: (32,), 2: (32, 14, 18)}
        assert cut.mean_row_tokens == 32

    def test_shorter_rows_stay(self):
        assert rows(8, {1: (50, 14)}).cut(64) == rows(8, {1: (50, 14)})
