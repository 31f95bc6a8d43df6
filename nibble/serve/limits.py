"""What one server takes of its clients at most: every bound of `nibble serve`."""

from dataclasses import dataclass

# Of one request; lists and texts that no answer needs longer.
MAX_CHOICES = 128
MAX_STOPS = 4
MAX_STOP_CHARS = 1_000
MAX_TOP_LOGPROBS = 20
MAX_NAME_CHARS = 128
ADAPTER_NAME = r"^[A-Za-z0-9][A-Za-z0-9._:/-]*$"


@dataclass(frozen=True)
class Limits:
    """Bounds of a server.

    Args:
        body_bytes: Of a request's body.
        new_tokens: Of an answer; also what a chat gets that names no number, where the context
            has room for it.
        running: Answers that are made at a time.
        waiting: Answers that wait for their turn; beyond them a request is refused (429).
        adapters: Loaded at a time.
        connections: Open at a time; beyond them a connection is refused (429).
        read_seconds: For the head of a request, then for its body, and for a client that does not
            read its answer.
        stop_seconds: For running answers once the server is asked to stop.
    """

    body_bytes: int = 1_000_000
    new_tokens: int = 1024
    running: int = 64
    waiting: int = 192
    adapters: int = 64
    connections: int = 256
    read_seconds: float = 20.0
    stop_seconds: float = 6.0

    @property
    def held(self) -> int:
        """Answers that run or wait at a time."""
        return self.running + self.waiting
