"""The main job on the bundled base: LoRA and QLoRA on the same letters to a shop."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from nibble import api
from nibble.adapter.format import read_adapter
from nibble.config import RunConfig, load_config
from nibble.data.dataset import build_dataset
from nibble.data.loader import eval_batches
from nibble.demo import BASE_FOLDER
from nibble.demo.data import make_examples, write_dataset
from nibble.events import EvalEnd, Event, LoadEnd, RunEnd, StepEnd
from nibble.model.load import load_base
from nibble.serve.generate import generate
from nibble.train.loss import token_metrics

METHODS = {"lora": "bf16", "qlora": "nf4"}
NUM_SHOWN = 3
MAX_ANSWER_TOKENS = 32
SETTINGS = (
    "train.steps=100",
    "train.batch_size=16",
    "train.micro_batch_size=16",
    "data.max_seq_len=256",
    "data.packing=false",
    "optim.lr=4e-3",
)


@dataclass(frozen=True)
class Learnt:
    """What one method cost and gained; losses in nats per target token, shares in [0, 1]."""

    method: str
    base_bytes: int
    peak_memory_bytes: int
    seconds_per_step: float
    adapter_bytes: int
    loss_before: float
    loss_after: float
    right_before: float
    right_after: float
    answers_before: tuple[str, ...]
    answers_after: tuple[str, ...]
    adapter: Path


@dataclass(frozen=True)
class Demo:
    """Both methods, and the letters whose answers are shown."""

    learnt: tuple[Learnt, ...]
    letters: tuple[str, ...]


@dataclass(frozen=True)
class _Answered:
    """The share of all held-out letters answered exactly, and the answers to the shown ones."""

    share_right: float
    shown: tuple[str, ...]


def run_demo(folder: Path, emit: Callable[[Event], None], say: Callable[[str], None]) -> Demo:
    """Train both methods in `folder` and measure what each learnt.

    Args:
        emit: Receives the events of both runs.
        say: Receives one line before each part.
    """
    # For a base this small, waiting for a second thread costs more than it brings.
    torch.set_num_threads(1)
    train_file, eval_file = write_dataset(folder / "data")
    letters = tuple(row["messages"][0]["content"] for row in make_examples()[1][:NUM_SHOWN])
    learnt = []
    for method, storage in METHODS.items():
        settings = [
            f"model.name={BASE_FOLDER}",
            f"data.train={train_file}",
            f"data.eval={eval_file}",
            f"method={method}",
            f"out={folder / method}",
        ]
        run = load_config(None, [*settings, *SETTINGS])
        say(f"{method}: held-out letters answered by the base")
        before = _answer(run, storage, None, letters)
        events: list[Event] = []

        def collect(event: Event, events: list[Event] = events) -> None:
            events.append(event)
            emit(event)

        say(f"{method}: training")
        adapter = api.train(run, collect).adapter
        say(f"{method}: the same letters answered with the adapter")
        after = _answer(run, storage, adapter, letters)
        learnt.append(_summary(method, events, before, after))
    return Demo(tuple(learnt), letters)


def _answer(
    run: RunConfig, storage: str, adapter: Path | None, letters: tuple[str, ...]
) -> _Answered:
    model, tokenizer = load_base(str(BASE_FOLDER), storage)
    if adapter is not None:
        read_adapter(model, adapter)
    rows = build_dataset(run.data, tokenizer, seed=0).eval
    # One row a batch: greedy decoding gives an answer exactly if every token of it is likeliest.
    counts = [token_metrics(model, batch)[1:] for batch in eval_batches(rows, max_tokens=1)]
    shown = tuple(
        generate(
            model,
            tokenizer,
            [{"role": "user", "content": letter}],
            max_new_tokens=MAX_ANSWER_TOKENS,
        )
        for letter in letters
    )
    return _Answered(sum(found == wanted for found, wanted in counts) / len(rows), shown)


def _summary(method: str, events: list[Event], before: _Answered, after: _Answered) -> Learnt:
    losses = [event.loss for event in events if isinstance(event, EvalEnd)]
    load: Any = next(event for event in events if isinstance(event, LoadEnd))
    end: Any = next(event for event in events if isinstance(event, RunEnd))
    adapters = sum(v for k, v in load.resident_bytes.items() if "adapter" in k)
    return Learnt(
        method=method,
        base_bytes=load.total_bytes - adapters,
        peak_memory_bytes=end.peak_memory_bytes,
        seconds_per_step=median(e.seconds for e in events if isinstance(e, StepEnd)),
        adapter_bytes=end.adapter_bytes,
        loss_before=losses[0],
        loss_after=losses[-1],
        right_before=before.share_right,
        right_after=after.share_right,
        answers_before=before.shown,
        answers_after=after.shown,
        adapter=Path(end.adapter),
    )
