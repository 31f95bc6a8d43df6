"""The JSON of answers, as OpenAI's clients read it."""

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nibble.serve.choice import Part, Scored

# JSON has no infinity; OpenAI tells impossible tokens so.
_LOWEST = -9999.0


@dataclass(frozen=True)
class Usage:
    """Tokens of the prompts and of the answers."""

    prompt: int
    completion: int

    def to_dict(self) -> dict[str, int]:
        """OpenAI's three counts."""
        total = self.prompt + self.completion
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": total,
        }


class ChatShape:
    """chat.completion and its chunks."""

    def __init__(self, model: str, *, has_usage: bool) -> None:
        self._head = _head("chatcmpl", model)
        self._has_usage = has_usage

    def whole(self, choices: Sequence[Sequence[Part]], usage: Usage) -> dict[str, Any]:
        """The answer at once."""
        found = []
        for index, parts in enumerate(choices):
            message = {"role": "assistant", "content": _text(parts), "refusal": None}
            found.append(_choice(index, parts, message=message, logprobs=_chat_logprobs(parts)))
        return {**self._head, "object": "chat.completion", "choices": found, **_usage(usage)}

    def first(self, index: int) -> dict[str, Any] | None:
        """The chunk that begins a choice."""
        return self._chunk(index, [], {"role": "assistant", "content": ""})

    def chunk(self, index: int, part: Part) -> dict[str, Any]:
        """What a part adds."""
        has_text = part.text or part.finish is None
        return self._chunk(index, [part], {"content": part.text} if has_text else {})

    def last(self, usage: Usage) -> dict[str, Any]:
        """The chunk with the counts."""
        return {**self._head, "object": "chat.completion.chunk", "choices": [], **_usage(usage)}

    def _chunk(self, index: int, parts: Sequence[Part], delta: Mapping[str, str]) -> dict[str, Any]:
        choice = _choice(index, parts, delta=delta, logprobs=_chat_logprobs(parts))
        chunk = {**self._head, "object": "chat.completion.chunk", "choices": [choice]}
        return {**chunk, "usage": None} if self._has_usage else chunk


class CompletionShape:
    """text_completion, whole and in chunks."""

    def __init__(self, model: str, *, has_usage: bool) -> None:
        self._head = {**_head("cmpl", model), "object": "text_completion"}
        self._has_usage = has_usage

    def whole(self, choices: Sequence[Sequence[Part]], usage: Usage) -> dict[str, Any]:
        """The answer at once."""
        found = [
            _choice(index, parts, text=_text(parts), logprobs=_text_logprobs(parts))
            for index, parts in enumerate(choices)
        ]
        return {**self._head, "choices": found, **_usage(usage)}

    def first(self, index: int) -> dict[str, Any] | None:
        """Nothing: a completion begins with its text."""
        return None

    def chunk(self, index: int, part: Part) -> dict[str, Any]:
        """What a part adds."""
        choice = _choice(index, [part], text=part.text, logprobs=_text_logprobs([part]))
        chunk = {**self._head, "choices": [choice]}
        return {**chunk, "usage": None} if self._has_usage else chunk

    def last(self, usage: Usage) -> dict[str, Any]:
        """The chunk with the counts."""
        return {**self._head, "choices": [], **_usage(usage)}


def model_card(name: str, created: int, base: str | None) -> dict[str, Any]:
    """An entry of /v1/models; an adapter names its base as `parent`."""
    card = {"id": name, "object": "model", "created": created, "owned_by": "nibble"}
    return card if base is None else {**card, "parent": base}


def _head(kind: str, model: str) -> dict[str, Any]:
    return {"id": f"{kind}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}


def _usage(usage: Usage) -> dict[str, Any]:
    return {"usage": usage.to_dict()}


def _choice(index: int, parts: Sequence[Part], **values: Any) -> dict[str, Any]:
    finish = parts[-1].finish if parts else None
    return {"index": index, **values, "finish_reason": finish}


def _text(parts: Sequence[Part]) -> str:
    return "".join(part.text for part in parts)


def _scored(parts: Sequence[Part]) -> list[Scored]:
    return [each for part in parts for each in part.scored]


def _chat_logprobs(parts: Sequence[Part]) -> dict[str, Any] | None:
    scored = _scored(parts)
    if not scored:
        return None
    content = [
        {
            **_token(each.text, each.logprob.logprob),
            "top_logprobs": [_token(text, value) for _, text, value in each.logprob.top],
        }
        for each in scored
    ]
    return {"content": content, "refusal": None}


def _token(text: str, logprob: float) -> dict[str, Any]:
    # A part of a character has no text of its own.
    in_bytes = None if "\ufffd" in text else list(text.encode())
    return {"token": text, "logprob": max(logprob, _LOWEST), "bytes": in_bytes}


def _text_logprobs(parts: Sequence[Part]) -> dict[str, Any] | None:
    scored = _scored(parts)
    if not scored:
        return None
    return {
        "tokens": [each.text for each in scored],
        "token_logprobs": [each.logprob and max(each.logprob.logprob, _LOWEST) for each in scored],
        "top_logprobs": [each.logprob and _top(each) for each in scored],
        "text_offset": [each.offset for each in scored],
    }


def _top(each: Scored) -> dict[str, float]:
    """The likeliest tokens and the token itself; of tokens that look alike the likeliest counts."""
    found: dict[str, float] = {}
    own = each.logprob
    for text, value in ((text, value) for _, text, value in own.top):
        found.setdefault(text, max(value, _LOWEST))
    found.setdefault(own.text, max(own.logprob, _LOWEST))
    return found
