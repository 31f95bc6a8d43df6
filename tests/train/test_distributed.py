"""Several ranks are one run: the same losses, the same files, the same end."""

import csv
import hashlib
import json
import multiprocessing
import runpy
import socket
import time
from pathlib import Path

import pytest
import torch

from nibble.errors import DataError
from nibble.events import EvalEnd, LoadEnd, StepEnd, WarningRaised, read_events
from nibble.model.tensors import read_entries
from nibble.train.distributed import ALONE, Ranks, joined

RANKED_RUN = Path(__file__).with_name("ranked_run.py")
LONGEST_SECONDS = 30


class Runs:
    """Runs that are all alike but for their folder and their number of ranks."""

    def __init__(self, folder, models):
        self.folder, self.models = folder, models
        words = ["one", "two", "three", "four", "five", "six", "seven"]
        pairs = [(a, b) for a in words for b in words]
        rows = [
            {"prompt": f"say {a} {b}", "completion": f"{b} {a} " * (1 + number % 3)}
            for number, (a, b) in enumerate(pairs)
        ]
        self.data = folder / "rows.jsonl"
        self.data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["nibble.api", "nibble.train.trainer"])

    def settings(self, name, *more):
        return [
            *(f"model.name={self.models('llama')}", f"data.train={self.data}", "data.eval=0.1"),
            *(f"out={self.folder / name}", "method=lora", "model.dtype=float32"),
            *("data.max_seq_len=128", "data.packing=false", "train.batch_size=7"),
            *("train.micro_batch_size=2", "train.steps=20", "lora.rank=4", "train.save_every=5"),
            *("train.recompute=none", "optim.paged=false", "model.embeddings=device"),
            *more,
        ]

    def run(self, name, num_ranks, *more, mishap=None, other=()):
        """Exit codes and seconds of the ranks; the last one gets `mishap` and `other` settings."""
        port, start = _free_port(), time.monotonic()
        processes = []
        for rank in range(num_ranks):
            is_last = rank == num_ranks - 1
            environment = {
                **{"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks},
                **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"},
            }
            given = {
                "settings": [*self.settings(name, *more), *(other if is_last else ())],
                "environment": {key: str(value) for key, value in environment.items()},
                "log": str(self.log(name, rank)),
                "mishap": mishap if is_last else None,
            }
            args = (str(RANKED_RUN), given)
            processes.append(self.context.Process(target=runpy.run_path, args=args))
        return self._ended(processes, start)

    def _ended(self, processes, start):
        for process in processes:
            process.start()
        first, codes = processes[0], []
        first.join(120)
        seconds = time.monotonic() - start
        for process in processes:
            process.join(1 if first.exitcode else 60)
            if process.exitcode is None:
                process.kill()
                process.join()
            codes.append(process.exitcode)
        return codes, seconds

    def log(self, name, rank):
        return self.folder / f"{name}-{rank}.log"

    def said(self, name, rank):
        return self.log(name, rank).read_text()

    def events(self, name, kind):
        events = read_events(self.folder / name / "events.jsonl")
        return [event for event in events if isinstance(event, kind)]

    def losses(self, name):
        return [event.loss for event in self.events(name, StepEnd | EvalEnd)]

    def results(self, name):
        """Digests of what a run computed."""
        out = self.folder / name
        state = max((out / "checkpoints").iterdir()) / "state.safetensors"
        adapter = out / "adapter" / "adapter_model.safetensors"
        with (out / "metrics.csv").open() as file:
            figures = [
                (row["step"], row["train_loss"], row["grad_norm"], row["eval_loss"])
                for row in csv.DictReader(file)
            ]
        digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (state, adapter)]
        return digests, figures

    def files(self, name):
        """The names of all files, and of all tensors with their shapes."""
        out = self.folder / name
        paths = sorted(p.relative_to(out) for p in out.rglob("*") if p.is_file())
        tensors = {
            f"{path}: {key}": (entry.dtype, entry.shape)
            for path in paths
            if path.suffix == ".safetensors"
            for key, entry in read_entries(out / path).items()
        }
        return paths, tensors


def _free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _largest_difference(a, b):
    assert len(a) == len(b) > 20
    return max(abs(x - y) / abs(x) for x, y in zip(a, b, strict=True))


def _base_bytes(event):
    """Bytes of the frozen weights; tables of rotations are made, not loaded."""
    others = ("adapters", "tables")
    return sum(size for kind, size in event.resident_bytes.items() if not kind.endswith(others))


@pytest.fixture(scope="module")
def runs(tiny_model_folder, tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("ranks"), tiny_model_folder)


@pytest.fixture(scope="module")
def alone(runs):
    """Runs of one process, by method: names of their folders."""
    names = {}

    def name_of(method):
        if method not in names:
            names[method] = f"alone-{method}"
            assert runs.run(names[method], 1, f"method={method}")[0] == [0]
        return names[method]

    return name_of


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("is_cut", [False, True], ids=["whole", "shards"])
def test_the_losses_are_those_of_one_process(runs, alone, is_cut, method, num_ranks):
    name, whole = f"{method}-{num_ranks}-{is_cut}", alone(method)
    more = (f"method={method}", f"train.shard={str(is_cut).lower()}")
    assert runs.run(name, num_ranks, *more)[0] == [0] * num_ranks
    assert _largest_difference(runs.losses(whole), runs.losses(name)) <= 1e-6
    assert runs.files(name) == runs.files(whole)
    tokens = [event.tokens for event in runs.events(name, StepEnd)]
    assert tokens == [event.tokens for event in runs.events(whole, StepEnd)]
    (own,), (all_bytes,) = (runs.events(each, LoadEnd) for each in (name, whole))
    assert _base_bytes(own) == pytest.approx(
        _base_bytes(all_bytes) / (num_ranks if is_cut else 1), rel=0.02
    )


def test_more_ranks_than_rows_in_a_step(runs):
    few = ("train.batch_size=2", "train.micro_batch_size=1", "train.steps=21")
    assert runs.run("few", 1, *few)[0] == [0]
    assert runs.run("few-4", 4, *few)[0] == [0] * 4
    assert _largest_difference(runs.losses("few"), runs.losses("few-4")) <= 1e-6


DROPOUT = ("lora.dropout=0.1", "train.eval_every=7")


@pytest.fixture(scope="module")
def uninterrupted(runs):
    assert runs.run("whole", 2, *DROPOUT)[0] == [0, 0]
    return runs.results("whole")


def test_a_signal_to_one_rank_stops_all_after_the_step(runs, uninterrupted):
    codes, _ = runs.run("stopped", 2, *DROPOUT, mishap=("SIGTERM", 8))
    assert codes == [75, 75]
    assert "stopped by SIGTERM; step 8 of 20 is saved" in runs.said("stopped", 0)
    assert len(runs.events("stopped", StepEnd)) == 8
    assert runs.run("stopped", 2, *DROPOUT)[0] == [0, 0]
    assert runs.results("stopped") == uninterrupted


@pytest.mark.parametrize("kind", ["SIGKILL", "SIGSTOP"])
def test_a_rank_that_is_gone_ends_the_others(runs, uninterrupted, kind):
    codes, seconds = runs.run(kind, 2, *DROPOUT, mishap=(kind, 8))
    assert codes == [75, -9]
    assert seconds < LONGEST_SECONDS
    assert "run the same command again to continue" in runs.said(kind, 0)
    assert runs.run(kind, 2, *DROPOUT)[0] == [0, 0]
    assert runs.results(kind) == uninterrupted


def test_an_error_of_one_rank_ends_the_others_and_is_named(runs):
    codes, _ = runs.run("error", 2, mishap=("error", 3))
    assert codes == [75, 74]
    assert "rank 1 ended" in runs.said("error", 0)


def test_a_loss_that_is_none_on_one_rank_stops_all_at_the_same_step(runs):
    codes, _ = runs.run("nan", 2, mishap=("nan", 5))
    assert codes == [76, 76]
    assert len(runs.events("nan", StepEnd)) == 5
    report = json.loads((runs.folder / "nan" / "nonfinite.json").read_text())
    assert report["step"] == 6
    rows = [row for each in report["passes"] for row in each["rows"]]
    assert len(rows) == 7
    assert "76 step 6: the loss is nan at rows" in runs.said("nan", 0)
    own = runs.said("nan", 0).splitlines()[0].partition(" ")[2]
    assert own == runs.said("nan", 1).splitlines()[0].partition(" ")[2]
    assert "step-00000006" not in {p.name for p in (runs.folder / "nan/checkpoints").iterdir()}


def test_a_base_in_shards_is_continued_and_its_ranks_stop_alike(runs):
    more = ("train.shard=true", *DROPOUT)
    assert runs.run("cut", 2, *more)[0] == [0, 0]
    assert runs.run("cut-stopped", 2, *more, mishap=("SIGTERM", 8))[0] == [75, 75]
    assert runs.run("cut-stopped", 2, *more)[0] == [0, 0]
    assert runs.results("cut-stopped") == runs.results("cut")
    assert runs.run("cut-nan", 2, *more, mishap=("nan", 5))[0] == [76, 76]
    report = json.loads((runs.folder / "cut-nan" / "nonfinite.json").read_text())
    assert len(report["passes"]) == 4
    codes, seconds = runs.run("cut-short", 2, *more, mishap=("no memory", 5))
    assert codes == [75, 77]
    assert seconds < LONGEST_SECONDS


def test_short_memory_on_one_rank_halves_the_passes_of_all(runs, alone):
    assert runs.run("short", 2, mishap=("memory", 4))[0] == [0, 0]
    assert _largest_difference(runs.losses(alone("lora")), runs.losses("short")) <= 1e-5
    halved = [e for e in runs.events("short", WarningRaised) if "memory ran out" in e.message]
    assert len(halved) == 1


def test_short_memory_at_one_row_ends_all(runs):
    codes, _ = runs.run("none", 2, "train.micro_batch_size=1", mishap=("no memory", 4))
    assert codes == [77, 77]


@pytest.mark.parametrize("num_ranks", [1, 4])
def test_another_number_of_ranks_goes_on(runs, alone, num_ranks):
    name = f"from-2-to-{num_ranks}"
    assert runs.run(name, 2, mishap=("SIGTERM", 10))[0] == [75, 75]
    assert runs.run(name, num_ranks)[0] == [0] * num_ranks
    assert _largest_difference(runs.losses(alone("lora")), runs.losses(name)) <= 1e-6
    warnings = [event.message for event in runs.events(name, WarningRaised)]
    assert any(f"ranks: 2 -> {num_ranks}" in warning for warning in warnings)


def test_ranks_with_another_config_are_refused(runs):
    codes, _ = runs.run("config", 2, other=["optim.lr=1e-3"])
    assert codes == [65, 65]
    assert "different configs" in runs.said("config", 0)
    assert "rank 1 (optim.lr: 0.0002 -> 0.001)" in runs.said("config", 0)


def test_ranks_with_other_data_are_refused(runs):
    codes, _ = runs.run("data", 2, mishap=("data", 0))
    assert codes == [65, 65]
    assert "different base or data" in runs.said("data", 0)
    assert "rank 1 (data: " in runs.said("data", 0)


def test_ranks_with_other_code_are_refused(runs):
    codes, _ = runs.run("code", 2, mishap=("code", 0))
    assert codes == [69, 69]
    assert "different code" in runs.said("code", 1)
    assert "rank 1 (code: " in runs.said("code", 0)


class TestAlone:
    """One process computes as if there were no ranks."""

    def test_what_it_gives_it_gets(self):
        value, tensor = {"a": float("nan")}, torch.ones(2)
        assert ALONE.of_first(value) is value
        assert ALONE.of_all(value) == [value]
        assert ALONE.sums([1, 0.1]) == [1, 0.1]
        ALONE.add_up([tensor])
        ALONE.copy_first([tensor])
        assert torch.equal(tensor, torch.ones(2))
        assert (ALONE.largest(3), ALONE.any(False), ALONE.is_first) == (3, False, True)

    def test_its_random_numbers_go_on(self):
        before = torch.get_rng_state()
        ALONE.draw_own(0, 1)
        assert torch.equal(torch.get_rng_state(), before)

    def test_it_is_the_same_as_itself(self):
        ALONE.check_same({"a": "1"}, DataError, "values")

    def test_nothing_is_joined(self):
        with joined() as ranks:
            assert ranks is ALONE


def test_ranks_draw_other_numbers_the_same_each_time():
    draws = set()
    with torch.random.fork_rng(devices=[]):
        for seed, step, rank in [(0, 1, 1), (0, 1, 2), (0, 2, 1), (1, 1, 1)] * 2:
            Ranks(rank, 4).draw_own(seed, step)
            draws.add(float(torch.rand(())))
    assert len(draws) == 4
