"""An engine without a model: every answer repeats its prompt, one byte a step.

An adapter answers in capitals. A prompt with "crash" in it fails the step that reads it.
"""

import re
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from nibble.errors import UsageError
from nibble.serve.limits import Limits
from nibble.serve.logprobs import TokenLogprob
from nibble.serve.models import Models
from nibble.serve.prompts import Prompts
from nibble.serve.sampling import Sampling
from nibble.serve.server import Service
from nibble.serve.worker import Worker

CONTEXT = 512
NUM_IDS = 256
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class ByteTokenizer:
    """Each byte is a token."""

    chat_template = TEMPLATE
    special_tokens_map: dict[str, str] = {}  # noqa: RUF012
    added_tokens_decoder: dict[int, str] = {}  # noqa: RUF012
    eos_token = bos_token = bos_token_id = eos_token_id = None
    is_fast = True

    def __call__(self, text, **options):
        return SimpleNamespace(input_ids=list(text.encode()))

    def decode(self, ids, **options):
        return bytes(ids).decode(errors="replace")


@dataclass(eq=False)
class Handle:
    ids: list[int]
    sampling: Sampling
    adapter: str | None
    num_new_tokens: int = 0
    prompt_logprobs: list[Any] = field(default_factory=list)

    @property
    def num_prompt_tokens(self):
        return len(self.ids)


class FakeBatch:
    """The engine's interface; `seen` is the largest number of answers in a step."""

    def __init__(self, adapters, max_tokens=CONTEXT):
        self.adapters, self.max_tokens = adapters, max_tokens
        self.handles: list[Handle] = []
        self.seen = 0

    def add(self, ids, sampling, *, adapter=None):
        if adapter is not None and adapter not in self.adapters.names:
            raise UsageError(f"no adapter is named {adapter!r}")
        if not ids:
            raise UsageError("the prompt is empty")
        if len(ids) + sampling.max_new_tokens > self.max_tokens:
            raise UsageError("more tokens than there is room for")
        self.handles.append(Handle(list(ids), sampling, adapter))
        return self.handles[-1]

    def step(self):
        self.seen = max(self.seen, len(self.handles))
        pieces = [self._advance(handle) for handle in list(self.handles)]
        self.handles = [
            handle
            for handle, piece in zip(self.handles, pieces, strict=True)
            if piece.finish is None
        ]
        return pieces

    def drop(self, handle):
        if handle in self.handles:
            self.handles.remove(handle)

    def has_work(self):
        return bool(self.handles)

    def uses(self, adapter):
        return any(handle.adapter == adapter for handle in self.handles)

    def _advance(self, handle):
        if b"crash" in bytes(handle.ids):
            raise RuntimeError("the engine crashed")
        sampling = handle.sampling
        if sampling.of_prompt and not handle.prompt_logprobs:
            scored = [self._logprob(token, sampling) for token in handle.ids[1:]]
            handle.prompt_logprobs = [None, *scored]
        if sampling.max_new_tokens == 0:
            return self._piece(handle, None, "", None, "length")
        if handle.num_new_tokens == len(handle.ids):
            return self._piece(handle, None, "", self._logprob(0, sampling), "stop")
        text = bytes(handle.ids).decode(errors="replace")
        text = text.upper() if handle.adapter else text
        letter = text[handle.num_new_tokens : handle.num_new_tokens + 1]
        handle.num_new_tokens += 1
        if letter in sampling.stop:
            return self._piece(handle, 88, "", self._logprob(88, sampling), "stop")
        token = letter.encode()[0] if letter else 0
        is_last = handle.num_new_tokens == sampling.max_new_tokens
        logprob = self._logprob(token, sampling)
        return self._piece(handle, token, letter, logprob, "length" if is_last else None)

    @staticmethod
    def _logprob(token, sampling):
        if sampling.num_logprobs is None:
            return None
        top = [(token, chr(token), -0.5), (65, "A", -1.5), (66, "B", float("-inf"))]
        return TokenLogprob(token, chr(token), -0.5, tuple(top[: sampling.num_logprobs]))

    @staticmethod
    def _piece(sequence, token, text, logprob, finish):
        return SimpleNamespace(
            sequence=sequence, token=token, text=text, logprob=logprob, finish=finish
        )


class FakeAdapters:
    def __init__(self, *names):
        self.names = names

    def load(self, name, folder):
        if re.search("broken", str(folder)):
            raise UsageError(f"{folder} is broken")
        self.names = (*self.names, name)

    def unload(self, name):
        self.names = tuple(each for each in self.names if each != name)


def fake_service(*names, limits=None, folders=(), tokenizer=None):
    """A service over the fake engine, with adapters of these names."""
    limits = limits or Limits()
    adapters = FakeAdapters(*names)
    worker = Worker(FakeBatch(adapters), num_places=limits.held)
    prompts = Prompts(tokenizer or ByteTokenizer(), num_ids=NUM_IDS)
    models = Models("base", adapters, worker, prompts, limits=limits, folders=folders)
    return Service(worker, models, prompts, limits, CONTEXT)
