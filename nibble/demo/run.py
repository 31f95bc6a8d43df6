"""The main job on the bundled base: LoRA and QLoRA on the same letters to a shop."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from nibble import api
from nibble.adapter.format import read_adapter
from nibble.config import load_config
from nibble.demo import BASE_FOLDER
from nibble.demo.data import make_examples, write_dataset
from nibble.events import EvalEnd, Event, LoadEnd, RunEnd, StepEnd
from nibble.model.load import load_base
from nibble.serve.generate import generate

METHODS = {"lora": "bf16", "qlora": "nf4"}
NUM_ANSWERS = 40
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
    """Both methods, and the held-out letters with their right answers."""

    learnt: tuple[Learnt, ...]
    letters: tuple[str, ...]
    right_answers: tuple[str, ...]


def run_demo(folder: Path, emit: Callable[[Event], None], say: Callable[[str], None]) -> Demo:
    """Train both methods in `folder` and measure what each learnt.

    Args:
        emit: Receives the events of both runs.
        say: Receives one line before each part.
    """
    train_file, eval_file = write_dataset(folder / "data")
    held_out = make_examples()[1][:NUM_ANSWERS]
    letters = tuple(row["messages"][0]["content"] for row in held_out)
    right = tuple(row["messages"][1]["content"] for row in held_out)
    learnt = []
    for method, storage in METHODS.items():
        say(f"{method}: {NUM_ANSWERS} held-out letters answered by the base")
        before = _answers(storage, None, letters)
        events: list[Event] = []

        def collect(event: Event, events: list[Event] = events) -> None:
            events.append(event)
            emit(event)

        say(f"{method}: training")
        run = load_config(
            None,
            [
                f"model.name={BASE_FOLDER}",
                f"data.train={train_file}",
                f"data.eval={eval_file}",
                f"method={method}",
                f"out={folder / method}",
                *SETTINGS,
            ],
        )
        adapter = api.train(run, collect).adapter
        say(f"{method}: the same letters answered with the adapter")
        after = _answers(storage, adapter, letters)
        learnt.append(_summary(method, events, before, after, right))
    return Demo(tuple(learnt), letters, right)


def _answers(storage: str, adapter: Path | None, letters: tuple[str, ...]) -> tuple[str, ...]:
    model, tokenizer = load_base(str(BASE_FOLDER), storage)
    if adapter is not None:
        read_adapter(model, adapter)
    return tuple(
        generate(
            model,
            tokenizer,
            [{"role": "user", "content": letter}],
            max_new_tokens=MAX_ANSWER_TOKENS,
        )
        for letter in letters
    )


def _summary(
    method: str,
    events: list[Event],
    before: tuple[str, ...],
    after: tuple[str, ...],
    right: tuple[str, ...],
) -> Learnt:
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
        right_before=_share_right(before, right),
        right_after=_share_right(after, right),
        answers_before=before,
        answers_after=after,
        adapter=Path(end.adapter),
    )


def _share_right(answers: tuple[str, ...], right: tuple[str, ...]) -> float:
    return sum(a.strip() == b for a, b in zip(answers, right, strict=True)) / len(right)
