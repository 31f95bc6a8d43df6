"""Short memory: what counts as it, halved passes, the rehearsal, and a whole run under it."""

import json

import pytest
import torch

import nibble
from nibble.data.chat import Example
from nibble.data.loader import Loader
from nibble.data.packing import pack
from nibble.errors import OutOfMemoryError
from nibble.events import StepEnd, WarningRaised
from nibble.model.adapt import adapt
from nibble.model.load import load_base
from nibble.train import job
from nibble.train.loss import token_loss
from nibble.train.optimizer import AdamW, parameter_groups
from nibble.train.pressure import (
    is_out_of_memory,
    out_of_memory_named,
    rehearse,
    step_within_memory,
)

CPU_ERROR = "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"
SHORTAGES = (torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError(CPU_ERROR))


def make_rows():
    """16 rows of 12 to 27 tokens."""
    generator = torch.Generator().manual_seed(0)
    examples = []
    for line in range(16):
        ids = torch.randint(5, 300, (12 + line,), generator=generator).tolist()
        examples.append(Example(ids, [-100] * 4 + ids[4:], "", line))
    return pack(examples, max_seq_len=64, packing=False)


class Training:
    """A small model with a loss that runs out of memory above so many tokens in a pass."""

    def __init__(self, folder, *, micro_batch_size=8, most_tokens=10**6, error=SHORTAGES[0]):
        self.model, _ = load_base(str(folder), "float32")
        adapt(self.model, rank=4, alpha=8, generator=torch.Generator().manual_seed(0))
        self.optimizer = AdamW(parameter_groups(self.model.train()))
        self.loader = Loader(make_rows(), batch_size=16, micro_batch_size=micro_batch_size, seed=0)
        self.most_tokens, self.error = most_tokens, error
        self.passes = []
        self.events = []

    def token_loss(self, batch):
        self.passes.append(batch.row_ids)
        loss, num_targets = token_loss(self.model, batch)
        if batch.input_ids.numel() > self.most_tokens:
            loss.backward()  # part of the gradient is there already when memory runs out
            raise self.error
        return loss, num_targets

    def step(self, lr=0.0):
        return step_within_memory(
            self.token_loss,
            self.loader,
            0,
            self.optimizer,
            lr=lr,
            max_grad_norm=float("inf"),
            emit=self.events.append,
        )

    def rehearse(self):
        rehearse(self.token_loss, self.loader, 3, self.optimizer, emit=self.events.append)

    def gradient(self):
        return torch.cat([p.grad.flatten() for p in self.trained()])

    def values(self):
        return torch.cat([p.detach().flatten() for p in self.trained()])

    def trained(self):
        return [p for p in self.model.parameters() if p.requires_grad]


@pytest.fixture
def training(tiny_model_folder):
    return lambda **settings: Training(tiny_model_folder("llama"), **settings)


class TestWhatCounts:
    @pytest.mark.parametrize("error", SHORTAGES, ids=lambda error: type(error).__name__)
    def test_a_failed_allocation(self, error):
        assert is_out_of_memory(error)

    @pytest.mark.parametrize(
        "error", [RuntimeError("shapes differ"), ValueError(CPU_ERROR), KeyboardInterrupt()]
    )
    def test_anything_else_is_none(self, error):
        assert not is_out_of_memory(error)

    def test_torch_on_this_cpu(self):
        with pytest.raises(RuntimeError) as caught:
            torch.empty(2**60, dtype=torch.uint8)
        assert is_out_of_memory(caught.value)


class TestStep:
    @pytest.mark.parametrize("error", SHORTAGES, ids=lambda error: type(error).__name__)
    def test_halved_passes_give_the_same_loss_and_gradient(self, training, error):
        free, short = training(), training(most_tokens=60, error=error)
        expected, found = free.step(), short.step()
        assert found.loss == pytest.approx(expected.loss, rel=1e-6)
        assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-6)
        assert found.tokens == expected.tokens
        assert found.num_target_tokens == expected.num_target_tokens
        difference = (free.gradient() - short.gradient()).norm() / free.gradient().norm()
        assert difference <= 1e-6

    def test_the_smaller_number_of_rows_is_kept_and_told(self, training):
        short = training(most_tokens=60)
        short.step()
        assert short.loader.micro_batch_size == 2
        messages = [event.message for event in short.events]
        assert all(isinstance(event, WarningRaised) for event in short.events)
        assert [message.partition(":")[0] for message in messages] == [
            "memory ran out with 8 rows in a forward pass; going on with 4",
            "memory ran out with 4 rows in a forward pass; going on with 2",
        ]
        short.passes.clear()
        short.step()
        assert {len(rows) for rows in short.passes} == {2}
        assert len(short.events) == 2

    def test_odd_numbers_are_rounded_up(self, training):
        short = training(micro_batch_size=5, most_tokens=82)
        short.step()
        assert short.loader.micro_batch_size == 3

    def test_enough_memory_changes_nothing(self, training):
        free = training()
        free.step()
        assert (free.loader.micro_batch_size, free.events) == (8, [])

    def test_one_row_that_is_too_large_is_an_error(self, training):
        short = training(micro_batch_size=4, most_tokens=20)
        with pytest.raises(torch.OutOfMemoryError):
            short.step()
        assert short.loader.micro_batch_size == 1
        assert len(short.events) == 2

    def test_other_errors_go_on_at_once(self, training):
        short = training(most_tokens=60, error=RuntimeError("shapes differ"))
        with pytest.raises(RuntimeError, match="shapes differ"):
            short.step()
        assert (short.loader.micro_batch_size, len(short.passes)) == (8, 1)

    def test_once_the_optimizer_moves_nothing_is_repeated(self, training, monkeypatch):
        short = training()

        def fail(lr):
            raise torch.OutOfMemoryError("in the optimizer")

        monkeypatch.setattr(short.optimizer, "step", fail)
        with pytest.raises(torch.OutOfMemoryError, match="in the optimizer"):
            short.step()
        assert (len(short.passes), short.loader.micro_batch_size) == (2, 8)
        assert short.events == []

    def test_the_parameters_move_once(self, training):
        free, short = training(), training(most_tokens=60)
        for one in (free, short):
            one.step(lr=1e-3)
            assert one.optimizer.num_steps == 1
        torch.testing.assert_close(free.values(), short.values(), rtol=0, atol=1e-5)


class TestRehearsal:
    def test_it_runs_the_largest_pass_of_the_run(self, training):
        free = training(micro_batch_size=4)
        free.rehearse()
        assert free.passes == [tuple(free.loader.largest_pass(3, 4))]

    def test_nothing_is_learnt(self, training):
        free = training()
        before = free.values()
        free.rehearse()
        assert torch.equal(free.values(), before)
        assert not free.gradient().any()
        assert free.optimizer.num_steps == 0

    @pytest.mark.parametrize("most_tokens", [10**6, 60])
    def test_the_random_state_is_put_back(self, training, monkeypatch, most_tokens):
        short = training(most_tokens=most_tokens)
        loss = short.token_loss

        def random_loss(batch):
            torch.rand(7)
            return loss(batch)

        monkeypatch.setattr(short, "token_loss", random_loss)
        torch.manual_seed(3)
        before = torch.random.get_rng_state()
        short.rehearse()
        assert torch.equal(torch.random.get_rng_state(), before)

    def test_passes_are_halved_until_the_largest_fits(self, training):
        short = training(most_tokens=60)
        short.rehearse()
        assert short.loader.micro_batch_size == 2
        assert [len(rows) for rows in short.passes] == [8, 4, 2]
        assert len(short.events) == 2
        assert not short.gradient().any()

    def test_one_row_that_is_too_large_is_an_error(self, training):
        with pytest.raises(torch.OutOfMemoryError):
            training(most_tokens=20).rehearse()

    def test_other_errors_go_on_at_once(self, training):
        short = training(most_tokens=60, error=RuntimeError("shapes differ"))
        with pytest.raises(RuntimeError, match="shapes differ"):
            short.rehearse()
        assert short.loader.micro_batch_size == 8


RUN = nibble.load_config(None, ["method=lora", "train.recompute=none", "optim.paged=false"])


class TestMessage:
    def test_what_is_set_already_is_no_way_out(self):
        values = {"method": "qlora", "train.recompute": "tiled", "lora.rank": 1}
        run = RUN.with_values(values, "flag")
        with pytest.raises(OutOfMemoryError) as caught, out_of_memory_named(run, {}):
            raise MemoryError
        ways = caught.value.fix.split(". ")[0].split("; or ")
        assert ways[0].startswith("lower data.max_seq_len")
        assert len(ways) == 3
        assert not any(key in caught.value.fix for key in values)

    def test_it_names_what_was_planned_and_the_ways_out(self):
        plan = {"parts": {"base in 4 bits": 5_400_000_000, "saved activations": 1_250_000_000}}
        with pytest.raises(OutOfMemoryError) as caught, out_of_memory_named(RUN, plan):
            raise torch.OutOfMemoryError("tried to allocate 2 GiB\nand more lines")
        text = str(caught.value)
        assert "ran out of memory: tried to allocate 2 GiB" in text
        assert "and more lines" not in text
        assert "5.40 GB  base in 4 bits" in text
        assert "1.25 GB  saved activations" in text
        assert "data.max_seq_len" in caught.value.fix
        assert caught.value.exit_code == 77

    def test_without_a_plan_there_is_no_table(self):
        with pytest.raises(OutOfMemoryError) as caught, out_of_memory_named(RUN, {}):
            raise MemoryError
        assert "no memory left" in str(caught.value)
        assert "the plan had" not in str(caught.value)

    @pytest.mark.parametrize("error", [RuntimeError("shapes differ"), KeyError("x")])
    def test_other_errors_stay_what_they_are(self, error):
        with pytest.raises(type(error)) as caught, out_of_memory_named(RUN, {}):
            raise error
        assert caught.value is error


class TestRun:
    @pytest.fixture
    def config(self, tiny_model_folder, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        data = tmp_path / "train.jsonl"
        words = ["one", "two", "three", "four", "five", "six"]
        rows = [{"prompt": f"say {word}", "completion": word} for word in words]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))

        def load(out, *more):
            values = {
                "model.name": tiny_model_folder("llama"),
                "model.dtype": "float32",
                "method": "lora",
                "lora.dropout": 0.1,
                "data.train": data,
                "data.packing": "false",
                "data.max_seq_len": 64,
                "train.recompute": "none",
                "train.batch_size": 6,
                "train.steps": 3,
                "optim.paged": "false",
                "optim.lr": 0.01,
                "out": tmp_path / out,
            }
            given = [f"{key}={value}" for key, value in values.items()]
            return nibble.load_config(None, [*given, *more])

        return load

    def test_a_run_that_outgrows_the_device_goes_on_with_fewer_rows(self, config, monkeypatch):
        def one_row_only(model, batch, *, autocast=None):
            if len(batch.row_ids) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return token_loss(model, batch, autocast=autocast)

        expected = nibble.train(config("single", "train.micro_batch_size=1"))
        monkeypatch.setattr(job, "token_loss", one_row_only)
        events = []
        result = nibble.train(config("short", "train.micro_batch_size=4"), events.append)
        warnings = [event.message for event in events if isinstance(event, WarningRaised)]
        assert [message.split(" rows")[0] for message in warnings] == [
            "memory ran out with 4",
            "memory ran out with 2",
        ]
        assert [event.step for event in events if isinstance(event, StepEnd)] == [1, 2, 3]
        assert result.final_loss == expected.final_loss

    def test_a_run_whose_rows_are_too_large_says_what_was_planned(self, config, monkeypatch):
        def never(model, batch, *, autocast=None):
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(job, "token_loss", never)
        with pytest.raises(OutOfMemoryError, match="the plan had") as caught:
            nibble.train(config("none", "train.micro_batch_size=2"))
        assert "base in 16 bits" in str(caught.value)
