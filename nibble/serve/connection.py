"""Connections that end: a bound on their number and on the time of silent and slow clients.

uvicorn bounds the time between two requests. Here are the rest: a head that does not become whole,
a body that goes on after its answer, an answer that nobody reads.
"""

import asyncio
from collections.abc import Callable
from typing import Any

from nibble.serve.limits import Limits
from nibble.serve.refusal import Refusal

_LOOK_EVERY_SECONDS = 1.0


class Connection(asyncio.Protocol):
    """Passes what a transport says on to uvicorn's protocol, and watches both.

    Args:
        inner: uvicorn's protocol of this connection.
        open_ones: Every open connection of the server.
    """

    def __init__(self, inner: Any, *, limits: Limits, open_ones: "set[Connection]") -> None:
        self._inner, self._limits, self._open_ones = inner, limits, open_ones
        self._transport: Any = None
        self._timer: asyncio.TimerHandle | None = None
        self._is_refused = self._is_unread = False
        # What is being waited for, and since when.
        self._waits_for: Any = None
        self._since = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take it, or refuse it where there are too many."""
        self._transport = transport
        self._is_refused = len(self._open_ones) >= self._limits.connections
        self._open_ones.add(self)
        if self._is_refused:
            self._transport.write(_too_many())
            self._transport.close()
        else:
            self._inner.connection_made(transport)
        self._look()

    def data_received(self, data: bytes) -> None:
        """Pass it on."""
        if not self._is_refused:
            self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        """Pass it on."""
        return None if self._is_refused else self._inner.eof_received()

    def pause_writing(self) -> None:
        """The client does not read."""
        self._is_unread = True
        if not self._is_refused:
            self._inner.pause_writing()

    def resume_writing(self) -> None:
        """The client has read."""
        self._is_unread = False
        if not self._is_refused:
            self._inner.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is over."""
        self._open_ones.discard(self)
        if self._timer is not None:
            self._timer.cancel()
        if not self._is_refused:
            self._inner.connection_lost(exc)

    def _look(self) -> None:
        """End the connection if it waits for the same thing for too long."""
        loop = asyncio.get_running_loop()
        waits_for = self._wait()
        if waits_for != self._waits_for:
            self._waits_for, self._since = waits_for, loop.time()
        elif waits_for is not None and loop.time() - self._since > self._limits.read_seconds:
            self._transport.abort()
            return
        self._timer = loop.call_later(_LOOK_EVERY_SECONDS, self._look)

    def _wait(self) -> Any:
        """What the client owes, one value for each time; None while the server is at work."""
        cycle = getattr(self._inner, "cycle", None)
        if self._is_unread or self._transport.is_closing():
            return "reading", id(cycle)
        is_idle = cycle is None or cycle.response_complete
        return ("a request", id(cycle)) if is_idle else None


def connections(make_inner: Callable[..., Any], limits: Limits) -> Callable[..., Connection]:
    """Makes the watched connections of one server, as uvicorn asks for them."""
    open_ones: set[Connection] = set()

    def make(**options: Any) -> Connection:
        return Connection(make_inner(**options), limits=limits, open_ones=open_ones)

    return make


def _too_many() -> bytes:
    body = Refusal(429, "too many connections; try again soon", code="too_many").to_bytes()
    head = (
        "HTTP/1.1 429 Too Many Requests\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nRetry-After: 1\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body
