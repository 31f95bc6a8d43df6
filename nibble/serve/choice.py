"""One answer as it grows: its text, and its log-probabilities with their places in the text."""

from dataclasses import dataclass
from typing import Any

from nibble.serve.prompts import Echo
from nibble.serve.text import TextStream


@dataclass(frozen=True)
class Scored:
    """A token with its log-probability, None for the first of a prompt.

    Args:
        offset: Characters of the choice's text before the token.
    """

    text: str
    offset: int
    logprob: Any = None


@dataclass(frozen=True)
class Part:
    """What one piece adds to a choice."""

    text: str
    scored: list[Scored]
    finish: str | None

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to send."""
        return not (self.text or self.scored or self.finish)


class Choice:
    """Turns the pieces of one answer into parts.

    Args:
        handle: What `Batch.add` returned.
        stream: Gives the places of tokens; None where no log-probabilities were asked for.
        has_end: Whether the token that ends an answer is told among the log-probabilities.
    """

    def __init__(
        self,
        handle: Any,
        *,
        stream: TextStream | None = None,
        echo: Echo | None = None,
        has_end: bool = False,
    ) -> None:
        self._handle, self._stream, self._echo = handle, stream, echo
        self._has_end = has_end
        self._offset = len(echo.text) if echo else 0

    def take(self, piece: Any) -> Part:
        """The part that a piece adds; the first brings the echoed prompt along."""
        text, scored = piece.text, []
        if self._echo is not None:
            text = self._echo.text + text
            scored = self._scored_prompt(self._echo)
            self._echo = None
        if self._stream is not None and piece.logprob is not None:
            if piece.token is not None:
                scored.append(Scored(piece.logprob.text, self._offset, piece.logprob))
                self._offset += len(self._stream.push(piece.token))
            elif self._has_end:
                scored.append(Scored(piece.logprob.text, self._offset, piece.logprob))
        return Part(text, scored, piece.finish)

    def _scored_prompt(self, echo: Echo) -> list[Scored]:
        logprobs = self._handle.prompt_logprobs if self._stream is not None else []
        return [
            Scored(echo.first if logprob is None else logprob.text, offset, logprob)
            for logprob, offset in zip(logprobs, echo.offsets, strict=True)
        ]
