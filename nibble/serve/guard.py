"""Who may ask, and how much of a body is read.

host     the Host header names this server, so that no web page reaches it under a name of its own
token    Authorization: Bearer TOKEN, for all but /health
body     JSON by its header, of bounded size, in bounded time
"""

import asyncio
import hmac
import ipaddress
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from nibble.serve.limits import Limits
from nibble.serve.refusal import Refusal

App = Callable[[Any, Any, Any], Awaitable[None]]
# A client that sends too much reads its answer only once it has sent it.
_READ_ANYWAY = 16
_CLOSE = {"Connection": "close"}


class Guard:
    """Lets requests through to `app` that come under a name of this server and with its token.

    Args:
        token: None asks for none.
        hosts: Names of this server in a Host header.
        any_address: Whether any IP address is one of its names.
    """

    def __init__(
        self, app: App, *, token: str | None, hosts: Sequence[str], any_address: bool = False
    ) -> None:
        self._app, self._any_address = app, any_address
        self._hosts = {name.lower() for name in hosts}
        self._token = None if token is None else token.encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """ASGI."""
        if scope["type"] == "http":
            try:
                self._check(scope)
            except Refusal as refusal:
                await send_refusal(refusal, send)
                return
        await self._app(scope, receive, send)

    def _check(self, scope: Mapping[str, Any]) -> None:
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        if not self._knows(host):
            raise Refusal(
                403,
                f"the Host header {host[:80]!r} is not a name of this server; "
                "start it with --allow-host NAME to answer under that name",
                code="host_not_allowed",
            )
        if self._token is None or scope["path"] == "/health":
            return
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        if kind.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self._token):
            raise Refusal(
                401,
                "the token is missing or wrong; send the header Authorization: Bearer TOKEN "
                "with the token that the server printed",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _knows(self, host: str) -> bool:
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        name = name.removeprefix("[").removesuffix("]").lower()
        return name in self._hosts or (self._any_address and _is_address(name))


async def send_refusal(refusal: Refusal, send: Any) -> None:
    """Answer with an error."""
    body = refusal.to_bytes()
    headers = {"Content-Type": "application/json", "Content-Length": len(body), **refusal.headers}
    raw = [(name.lower().encode(), str(value).encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


async def read_body(headers: Mapping[str, str], receive: Any, limits: Limits) -> bytes:
    """The body of a request.

    Raises:
        Refusal: 415 if it is not said to be JSON, 413 if it is too large, 408 if it comes too
            slowly, 400 if the client left.
    """
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # A web page may send other kinds to any server without being asked for leave.
        raise Refusal(
            415,
            f"the body is {kind[:80] or 'of no kind'}; send Content-Type: application/json",
            code="unsupported_media_type",
            headers=_CLOSE,
        )
    try:
        async with asyncio.timeout(limits.read_seconds):
            return await _read(receive, limits.body_bytes)
    except TimeoutError:
        raise Refusal(
            408,
            f"the body did not come within {limits.read_seconds:g} seconds",
            code="timeout",
            headers=_CLOSE,
        ) from None


async def _read(receive: Any, most_bytes: int) -> bytes:
    body, num_bytes, is_more = bytearray(), 0, True
    while is_more and num_bytes <= _READ_ANYWAY * most_bytes:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Refusal(400, "the client left before its body was whole", code="disconnected")
        part = message.get("body", b"")
        num_bytes, is_more = num_bytes + len(part), message.get("more_body", False)
        if num_bytes <= most_bytes:
            body += part
    if num_bytes > most_bytes:
        raise Refusal(
            413,
            f"the body has more than {most_bytes:,} bytes",
            code="request_too_large",
            headers=_CLOSE,
        )
    return bytes(body)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
