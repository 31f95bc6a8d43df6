"""The main job on the bundled base: LoRA and QLoRA on the same letters to a shop."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from nibble.adapter.format import read_adapter
from nibble.config import DataConfig, load_config
from nibble.data.dataset import build_dataset
from nibble.data.loader import eval_batches
from nibble.demo import BASE_FOLDER
from nibble.demo.data import UNSEEN_EVERY, make_examples, write_dataset
from nibble.errors import NibbleError
from nibble.events import Event, LoadEnd, RunEnd, StepEnd, read_events
from nibble.model.load import load_base
from nibble.serve.generate import generate
from nibble.train.loss import token_metrics

METHODS = {"lora": "bf16", "qlora": "nf4"}
NUM_SHOWN = 3
# For a base this small, waiting for a second thread costs more than it brings.
NUM_THREADS = 1
MAX_ANSWER_TOKENS = 48
SETTINGS = (
    "train.steps=150",
    "train.batch_size=16",
    "train.micro_batch_size=16",
    "data.max_seq_len=256",
    "data.packing=false",
    "optim.lr=6e-3",
)


@dataclass(frozen=True)
class Learnt:
    """What one method cost and gained; losses in nats per target token, shares in [0, 1].

    `right_after_unseen` counts only letters whose wording is in no training letter.
    """

    method: str
    base_bytes: int
    peak_memory_bytes: int
    seconds_per_step: float
    adapter_bytes: int
    loss_before: float
    loss_after: float
    right_before: float
    right_after: float
    right_after_unseen: float
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
    """Loss on all held-out letters, which are answered exactly, the answers to the shown ones."""

    loss: float
    right: tuple[bool, ...]
    shown: tuple[str, ...]


def run_demo(folder: Path, say: Callable[[str], None]) -> Demo:
    """Train both methods in `folder` and measure what each learnt.

    Args:
        say: Receives one line before each part.

    Raises:
        NibbleError: If a training process fails; it has said why.
    """
    torch.set_num_threads(NUM_THREADS)
    train_file, eval_file = write_dataset(folder / "data")
    letters = tuple(row["messages"][0]["content"] for row in make_examples()[1][:NUM_SHOWN])
    learnt = []
    for method, storage in METHODS.items():
        out = folder / method
        settings = [
            f"model.name={BASE_FOLDER}",
            f"data.train={train_file}",
            f"method={method}",
            f"out={out}",
            *SETTINGS,
        ]
        held_out = load_config(None, [*settings, f"data.train={eval_file}"]).data
        say(f"{method}: held-out letters answered by the base")
        before = _answer(held_out, storage, None, letters)
        say(f"{method}: training")
        _train_apart(settings)
        say(f"{method}: the same letters answered with the adapter")
        after = _answer(held_out, storage, out / "adapter", letters)
        learnt.append(_summary(method, list(read_events(out / "events.jsonl")), before, after))
    return Demo(tuple(learnt), letters)


def _train_apart(settings: list[str]) -> None:
    """`nibble train` in a process of its own, so that peaks of memory can be compared."""
    words = [word for setting in settings for word in ("--set", setting)]
    command = [sys.executable, "-m", "nibble", "train", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": str(NUM_THREADS)}
    code = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL).returncode
    if code:
        raise NibbleError(f"training ended with exit code {code}", fix="read its message above")


def _answer(
    held_out: DataConfig, storage: str, adapter: Path | None, letters: tuple[str, ...]
) -> _Answered:
    model, tokenizer = load_base(str(BASE_FOLDER), storage)
    if adapter is not None:
        read_adapter(model, adapter)
    rows = build_dataset(held_out, tokenizer, seed=0).train
    # One row a batch: greedy decoding gives an answer exactly if every token of it is likeliest.
    counts = [token_metrics(model, batch) for batch in eval_batches(rows, max_tokens=1)]
    shown = tuple(
        generate(
            model,
            tokenizer,
            [{"role": "user", "content": letter}],
            max_new_tokens=MAX_ANSWER_TOKENS,
        )
        for letter in letters
    )
    loss_sums, found, wanted = zip(*counts, strict=True)
    right = tuple(f == w for f, w in zip(found, wanted, strict=True))
    return _Answered(sum(loss_sums) / sum(wanted), right, shown)


def _summary(method: str, events: list[Event], before: _Answered, after: _Answered) -> Learnt:
    load: Any = next(event for event in events if isinstance(event, LoadEnd))
    end: Any = next(event for event in events if isinstance(event, RunEnd))
    adapters = sum(v for k, v in load.resident_bytes.items() if "adapter" in k)
    return Learnt(
        method=method,
        base_bytes=load.total_bytes - adapters,
        peak_memory_bytes=end.peak_memory_bytes,
        seconds_per_step=median(e.seconds for e in events if isinstance(e, StepEnd)),
        adapter_bytes=end.adapter_bytes,
        loss_before=before.loss,
        loss_after=after.loss,
        right_before=mean(before.right),
        right_after=mean(after.right),
        right_after_unseen=mean(after.right[::UNSEEN_EVERY]),
        answers_before=before.shown,
        answers_after=after.shown,
        adapter=Path(end.adapter),
    )
