"""Continuous batching: many answers at once over one base and its adapters.

    batch = Batch(model, tokenizer, adapters, max_tokens=65536)
    answer = batch.add(ids, Sampling(max_new_tokens=100), adapter="law")
    while batch.has_work():
        for piece in batch.step():
            ...

A step runs the prompts that fit, one after the other, and then gives every answer that was running
its next token in one packed row. Answers of one adapter lie together in it. Each answer's tokens
are the same as if it were alone.

Not thread-safe: one thread adds, steps and drops. Knows nothing of requests and connections.
"""

from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor

from nibble.adapter.many import Adapters
from nibble.errors import UsageError
from nibble.kernels.few_rows import MOST_ROWS, few_rows
from nibble.model.cache import CachedDocuments, KeyValues, cached_states
from nibble.model.families import head_of
from nibble.model.lean import use_lean_layers
from nibble.serve.logprobs import Logprobs, TokenLogprob
from nibble.serve.sampling import Sampling, choose, make_generator
from nibble.serve.stops import stop_ids
from nibble.serve.text import TextStream

# A step begins no further prompt after so many tokens of prompts, so that running answers go on.
PROMPT_TOKENS = 512
# Rotations of these kinds depend on the longest position in a row, so rows hold one answer.
_LENGTH_DEPENDENT = ("dynamic", "longrope")

Finish = Literal["stop", "length"]


class Answer:
    """One prompt and what the model says to it; made by `Batch.add`.

    Attributes:
        num_prompt_tokens: Tokens of the prompt.
        num_new_tokens: Tokens of the answer so far, without one that ends it.
        prompt_logprobs: Of each token of the prompt, None for the first; empty unless asked for.
        adapter: Name of the adapter; None is the base.
        finish: Why the answer ended; None while it goes on.
    """

    def __init__(
        self, ids: Sequence[int], sampling: Sampling, adapter: str | None, stream: TextStream
    ) -> None:
        self.num_prompt_tokens, self.num_new_tokens = len(ids), 0
        self.prompt_logprobs: list[TokenLogprob | None] = []
        self.sampling, self.adapter = sampling, adapter
        self.finish: Finish | None = None
        self.stream = stream
        self.generator = make_generator(sampling.seed)
        self.prompt, self.last = list(ids), -1
        self.cache: KeyValues | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens whose keys and values are kept at most."""
        return self.num_prompt_tokens + self.sampling.max_new_tokens


@dataclass(frozen=True)
class Piece:
    """What one step gave one answer.

    Args:
        sequence: What `Batch.add` returned.
        token: None in a piece that only ends the answer.
        text: Text that is final: whole characters, and nothing that may become a stop text.
        logprob: Of the token, where asked for; also of the one that ends the answer.
        finish: "stop": an end-of-answer token or a stop text came. "length": the answer has as
            many tokens as it may.
    """

    sequence: Answer
    token: int | None
    text: str
    logprob: TokenLogprob | None
    finish: Finish | None


class Batch:
    """Answers that are made together.

    Args:
        model: A base or an adapted model; its layers get their lean form.
        adapters: The adapters of the base, for answers that ask for one.
        max_tokens: Keys and values of so many tokens are kept at once at most, over all answers.
        max_sequences: So many answers run at once at most.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        adapters: Adapters | None = None,
        *,
        max_tokens: int,
        max_sequences: int = 64,
    ) -> None:
        use_lean_layers(model)
        model.eval()
        self._model, self._tokenizer, self._adapters = model, tokenizer, adapters
        self._max_tokens, self._max_sequences = max_tokens, max_sequences
        self._context = getattr(model.config, "max_position_embeddings", None) or max_tokens
        self._head, self._logprobs = head_of(model), Logprobs(tokenizer)
        self._stop_ids = stop_ids(model, tokenizer)
        self._rows_at_once = 1 if _depends_on_length(model.config) else MOST_ROWS
        self._waiting: deque[Answer] = deque()
        self._running: list[Answer] = []
        self._documents: dict[tuple[int, ...], CachedDocuments] = {}
        self._next_documents: dict[tuple[int, ...], CachedDocuments] = {}

    def add(self, ids: Sequence[int], sampling: Sampling, *, adapter: str | None = None) -> Answer:
        """Take a prompt; it waits while there is no room, first come, first served.

        Raises:
            UsageError: If the adapter is unknown, the prompt empty, or prompt and longest answer
                together longer than the context of the model or `max_tokens`.
        """
        if adapter is not None:
            if self._adapters is None:
                raise UsageError(f"no adapter is named {adapter!r} (none is loaded)")
            self._adapters.check(adapter)
        if not ids:
            raise UsageError("the prompt is empty", fix="give at least one token")
        answer = Answer(ids, sampling, adapter, TextStream(self._tokenizer, sampling.stop))
        most = min(self._context, self._max_tokens)
        if answer.num_tokens > most:
            raise UsageError(
                f"{len(ids):,} tokens of the prompt and up to {sampling.max_new_tokens:,} new ones "
                f"are more than the {most:,} that there is room for",
                fix="shorten the prompt, or lower max_new_tokens",
            )
        self._waiting.append(answer)
        return answer

    @torch.no_grad()
    def step(self) -> list[Piece]:
        """Run waiting prompts that fit, and give the running answers one token each.

        Returns:
            At most one piece for each answer; nothing when idle.
        """
        with few_rows():
            running, pieces = list(self._running), []
            num_tokens = 0
            while num_tokens < PROMPT_TOKENS and self._has_room():
                answer = self._waiting.popleft()
                num_tokens += answer.num_prompt_tokens
                pieces.append(self._prefill(answer))
            self._next_documents = {}
            for start in range(0, len(running), self._rows_at_once):
                pieces += self._decode(running[start : start + self._rows_at_once])
            self._documents = self._next_documents
        self._running = [answer for answer in self._running if answer.finish is None]
        return pieces

    def drop(self, answer: Answer) -> None:
        """Forget an answer; its room is free at once."""
        for answers in (self._waiting, self._running):
            if answer in answers:
                answers.remove(answer)
        answer.cache = None

    def has_work(self) -> bool:
        """Whether an answer waits or runs."""
        return bool(self._waiting or self._running)

    def uses(self, adapter: str) -> bool:
        """Whether an answer that waits or runs asked for this adapter."""
        return any(answer.adapter == adapter for answer in (*self._waiting, *self._running))

    def _has_room(self) -> bool:
        """Whether the first that waits may run now."""
        if not self._waiting or len(self._running) >= self._max_sequences:
            return False
        held = sum(answer.num_tokens for answer in self._running)
        return held + self._waiting[0].num_tokens <= self._max_tokens

    def _prefill(self, answer: Answer) -> Piece:
        """The prompt in one row of its own: the same call whatever else there is."""
        answer.cache = KeyValues(answer.num_tokens)
        documents = CachedDocuments([answer.cache], [answer.num_prompt_tokens])
        with self._choice([answer]):
            states = cached_states(self._model, documents, answer.prompt, self._head.weight.device)
        sampling = answer.sampling
        if sampling.of_prompt and sampling.num_logprobs is not None:
            answer.prompt_logprobs = [None]
            for start in range(0, len(states) - 1, MOST_ROWS):
                tokens = answer.prompt[start + 1 : start + 1 + MOST_ROWS]
                logits = self._head.logits(states[start : start + len(tokens)])
                answer.prompt_logprobs += self._logprobs.of(logits, tokens, sampling.num_logprobs)
        self._running.append(answer)
        self._running.sort(key=lambda each: each.adapter or "")
        if sampling.max_new_tokens == 0:
            return self._end(answer, "length")
        logits = self._head.logits(states[-1:])
        return self._advance(answer, logits, int(logits.argmax()), 0)

    def _decode(self, answers: list[Answer]) -> list[Piece]:
        """The next token of running answers, in one packed row."""
        caches = [answer.cache for answer in answers if answer.cache is not None]
        documents = self._documents_of(caches)
        with self._choice(answers):
            ids = [answer.last for answer in answers]
            states = cached_states(self._model, documents, ids, self._head.weight.device)
        logits = self._head.logits(states)
        likeliest = logits.argmax(-1).tolist()
        if any(_needs_logits(answer.sampling) for answer in answers):
            logits = logits.cpu()
        return [
            self._advance(answer, logits, likeliest[row], row) for row, answer in enumerate(answers)
        ]

    def _documents_of(self, caches: list[KeyValues]) -> CachedDocuments:
        """Those of the last step where the same sequences go on."""
        key = tuple(map(id, caches))
        documents = self._documents.get(key)
        if documents is None:
            documents = CachedDocuments(caches, [1] * len(caches))
        self._next_documents[key] = documents
        return documents

    def _choice(self, answers: Sequence[Answer]) -> AbstractContextManager[None]:
        """The adapter of each row, where there are adapters; answers are in their order."""
        if self._adapters is None:
            return nullcontext()
        slices, start = [], 0
        for name, group in groupby(answers, key=lambda answer: answer.adapter):
            stop = start + len(list(group))
            if name is not None:
                # A prompt is one answer with many rows.
                slices.append((name, slice(start, stop) if len(answers) > 1 else slice(None)))
            start = stop
        return self._adapters.rows(tuple(slices))

    def _advance(self, answer: Answer, logits: Tensor, likeliest: int, row: int) -> Piece:
        """Choose the token that the logits of a row ask for, and take it into the answer."""
        sampling = answer.sampling
        token, logprob = likeliest, None
        if sampling.temperature > 0:
            token = choose(logits[row].cpu(), sampling, answer.generator)
        if sampling.num_logprobs is not None:
            (logprob,) = self._logprobs.of(logits[row : row + 1], [token], sampling.num_logprobs)
        if token in self._stop_ids:
            return self._end(answer, "stop", logprob)
        answer.last = token
        answer.num_new_tokens += 1
        text = answer.stream.push(token)
        if answer.stream.is_stopped:
            answer.finish = "stop"
        elif answer.num_new_tokens == sampling.max_new_tokens:
            text += answer.stream.flush()
            answer.finish = "stop" if answer.stream.is_stopped else "length"
        return Piece(answer, token, text, logprob, answer.finish)

    def _end(self, answer: Answer, finish: Finish, logprob: TokenLogprob | None = None) -> Piece:
        answer.finish = finish
        return Piece(answer, None, answer.stream.flush(), logprob, finish)


def _needs_logits(sampling: Sampling) -> bool:
    return sampling.temperature > 0 or sampling.num_logprobs is not None


def _depends_on_length(config: Any) -> bool:
    """Whether the rotation of a token depends on the longest position in its row."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    return any(kind.get("rope_type") in _LENGTH_DEPENDENT for kind in kinds)
