"""Tokens to text while they come: whole characters only, and never a part of a stop text."""

from collections.abc import Sequence
from typing import Any

_BROKEN = "\ufffd"


class TextStream:
    """The text of an answer, piece by piece.

    The pieces together are what the tokenizer makes of all tokens at once. Text is held back while
    a character is not whole, and while it may become a stop text.

    Args:
        stop: Texts that end the answer and are not part of it.

    Attributes:
        is_stopped: Whether a stop text came.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids: list[int] = []
        # Tokens before `_given` are text already; those from `_start` on are its context.
        self._start = self._given = 0
        self._held = ""
        self.is_stopped = False

    def push(self, token: int) -> str:
        """The text that is final now."""
        self._ids.append(token)
        return self._release(self._new_text(is_last=False))

    def flush(self) -> str:
        """The rest of the text, at the end of the answer."""
        text = self._release(self._new_text(is_last=True))
        if self.is_stopped:
            return text
        held, self._held = self._held, ""
        return text + held

    def _new_text(self, *, is_last: bool) -> str:
        before = self._decode(self._ids[self._start : self._given])
        text = self._decode(self._ids[self._start :])
        if not is_last and (text.endswith(_BROKEN) or len(text) <= len(before)):
            return ""
        self._start, self._given = self._given, len(self._ids)
        return text[len(before) :]

    def _release(self, text: str) -> str:
        """Of what is held and this new text, what is final; the rest is held."""
        text = self._held + text
        if self.is_stopped or not self._stop:
            self._held = ""
            return "" if self.is_stopped else text
        found = [at for at in map(text.find, self._stop) if at >= 0]
        if found:
            self._held, self.is_stopped = "", True
            return text[: min(found)]
        cut = len(text) - max(_overlap(text, stop) for stop in self._stop)
        self._held = text[cut:]
        return text[:cut]

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True) if ids else ""


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`.

    ("the en", "end") -> 2.
    """
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
