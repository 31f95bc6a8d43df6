"""A conversation with a base and its adapters: what was said, and how answers are drawn.

Knows nothing of a terminal; `nibble.commands.chat` reads and shows.
"""

import json
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nibble.adapter.many import Adapters
from nibble.data.chat import prompt_ids, tokenize
from nibble.data.formats import row_to_conversation
from nibble.disk import disk_errors
from nibble.errors import UsageError, did_you_mean
from nibble.serve.batch import Answer, Batch
from nibble.serve.generate import Sampling

SETTINGS: dict[str, type] = {
    "max_new_tokens": int,
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "seed": int,
    "stop": str,
}


@dataclass(frozen=True)
class Part:
    """New text of one of the answers to a question.

    Args:
        number: Of the answer, from 0, in the order of `Chat.speakers`.
        text: Text that is final.
        is_last: Whether this answer ends here.
    """

    number: int
    text: str
    is_last: bool


@dataclass(frozen=True)
class Pace:
    """What one answer took.

    Args:
        first_s: Seconds from the question to the first token.
        seconds: From the question to the end of the answer.
        is_cut: Whether it has as many tokens as it may, and does not end by itself.
    """

    adapter: str | None
    num_prompt_tokens: int
    num_new_tokens: int
    first_s: float
    seconds: float
    is_cut: bool

    @property
    def tokens_per_s(self) -> float:
        """Tokens after the first, a second."""
        return max(0, self.num_new_tokens - 1) / max(1e-9, self.seconds - self.first_s)


class Chat:
    """Questions and answers, the system turn before them, and who answers.

    Args:
        model: A base, as `load_base` gives it.
        adapters: The adapters of that base; the first one answers.

    Attributes:
        turns: User and assistant by turns.
        adapter: Who answers; None is the base.
        is_comparing: Whether the base answers beside the adapter.
        paces: Of the answers to the last question.
    """

    def __init__(
        self, model: Any, tokenizer: Any, adapters: Adapters, *, sampling: Sampling | None = None
    ) -> None:
        self._model, self._tokenizer, self.adapters = model, tokenizer, adapters
        self.sampling = sampling or Sampling()
        self.system = ""
        self.turns: list[dict[str, str]] = []
        self.adapter: str | None = next(iter(adapters.names), None)
        self.is_comparing = False
        self.paces: list[Pace] = []

    @property
    def speakers(self) -> tuple[str | None, ...]:
        """Who answers the next question; the last one's answer stays in the conversation."""
        is_beside = self.is_comparing and self.adapter is not None
        return (None, self.adapter) if is_beside else (self.adapter,)

    @property
    def context(self) -> int | None:
        """Tokens that a prompt and its answer may have together; None is any number."""
        return getattr(self._model.config, "max_position_embeddings", None)

    @property
    def has_template(self) -> bool:
        """Whether the model came with a chat template of its own."""
        return bool(self._tokenizer.chat_template)

    def ask(self, question: str) -> Generator[Part, None, None]:
        """The answers to a question, as they grow.

        Where the generator is closed early, what was said until then is the answer; where nothing
        was, the question is forgotten.

        Raises:
            UsageError: If the conversation is longer than the context of the model.
            DataError: If the chat template does not take the conversation.
        """
        turn = {"role": "user", "content": question}
        ids = prompt_ids([*self._before(), turn], self._tokenizer)
        sampling = self._within_context(len(ids))
        speakers = self.speakers
        room = len(speakers) * (len(ids) + sampling.max_new_tokens)
        batch = Batch(self._model, self._tokenizer, self.adapters, max_tokens=room)
        answers = [batch.add(ids, sampling, adapter=name) for name in speakers]
        return self._answers(turn, batch, answers)

    def _answers(
        self, turn: dict[str, str], batch: Batch, answers: Sequence[Answer]
    ) -> Generator[Part, None, None]:
        start = time.perf_counter()
        texts = [""] * len(answers)
        first, end = [0.0] * len(answers), [0.0] * len(answers)
        try:
            while batch.has_work():
                for piece in batch.step():
                    number = answers.index(piece.sequence)
                    end[number] = time.perf_counter() - start
                    first[number] = first[number] or end[number]
                    texts[number] += piece.text
                    yield Part(number, piece.text, piece.finish is not None)
        finally:
            self.paces = [_pace(*each) for each in zip(answers, first, end, strict=True)]
            if texts[-1]:
                self.turns += [turn, {"role": "assistant", "content": texts[-1]}]

    def switch(self, name: str) -> None:
        """Let an adapter answer, or the base by the name "base".

        Raises:
            UsageError: If there is no such adapter.
        """
        known = ("base", *self.adapters.names)
        if name not in known:
            close = did_you_mean(name, known)
            raise UsageError(f"no adapter is named {name!r} ({', '.join(known)})", fix=close)
        self.adapter = None if name == "base" and "base" not in self.adapters.names else name

    def set(self, key: str, value: str) -> None:
        """Change one of SETTINGS; a seed of "none" leaves draws to chance.

        Raises:
            UsageError: If there is no such setting, or the value is out of range.
        """
        if key not in SETTINGS:
            close = did_you_mean(key, SETTINGS)
            raise UsageError(f"there is no setting {key!r} ({', '.join(SETTINGS)})", fix=close)
        self.sampling = replace(self.sampling, **{key: _parsed(key, value)})

    def undo(self) -> bool:
        """Take the last question and its answer back; whether there was one."""
        has_any = bool(self.turns)
        del self.turns[-2:]
        return has_any

    def reset(self) -> None:
        """Forget all questions and answers; the system turn stays."""
        self.turns.clear()

    def save(self, path: Path) -> int:
        """Append the conversation to a file as one row for training; the number of its turns.

        Raises:
            UsageError: If nothing was said, or the file's name does not end in .jsonl.
            DataError: If training would not take the row.
            DiskError: If the file cannot be written.
        """
        if path.suffix != ".jsonl":
            raise UsageError(f"{path} does not end in .jsonl", fix="/save chats.jsonl")
        if not self.turns:
            raise UsageError("there is nothing to save yet", fix="ask something first")
        row = {"messages": [*self._before()]}
        tokenize(row_to_conversation(row, format="messages", path="", line=0), self._tokenizer)
        line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
        with disk_errors(f"cannot write {path}"), path.open("ab+") as file:
            if file.tell():
                file.seek(-1, 2)
                line = line if file.read(1) == b"\n" else b"\n" + line
            file.write(line)
        return len(row["messages"])

    def num_tokens(self) -> int:
        """Tokens of the conversation so far, as the next prompt would have them."""
        before = self._before()
        return len(prompt_ids(before, self._tokenizer)) if before else 0

    def _before(self) -> list[dict[str, str]]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *self.turns]

    def _within_context(self, num_tokens: int) -> Sampling:
        if self.context is None:
            return self.sampling
        room = self.context - num_tokens
        if room < 1:
            raise UsageError(
                f"the conversation has {num_tokens:,} tokens with this question, and the context "
                f"of the model is {self.context:,}",
                fix="/reset begins anew, /undo takes the last question back",
            )
        return replace(self.sampling, max_new_tokens=min(room, self.sampling.max_new_tokens))


def _pace(answer: Answer, first_s: float, seconds: float) -> Pace:
    return Pace(
        answer.adapter,
        answer.num_prompt_tokens,
        answer.num_new_tokens,
        first_s,
        seconds,
        answer.finish == "length",
    )


def _parsed(key: str, value: str) -> Any:
    """The value of a setting from its text; texts that stop may be JSON: "\\n" or ["a", "b"]."""
    if key == "stop":
        try:
            found = json.loads(value)
        except ValueError:
            found = value
        texts = [] if found in ("", None, "none") else found if isinstance(found, list) else [found]
        return tuple(str(text) for text in texts)
    if key == "seed" and value == "none":
        return None
    try:
        return SETTINGS[key](value)
    except ValueError:
        what = "a whole number" if SETTINGS[key] is int else "a number"
        raise UsageError(f"{key} is {value!r}, expected {what}") from None
