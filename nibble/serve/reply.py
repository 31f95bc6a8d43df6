"""Sends answers to a client while it is there: whole, or piece by piece as server-sent events."""

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any

from nibble.serve.choice import Choice, Part
from nibble.serve.guard import send_refusal
from nibble.serve.refusal import Refusal, to_json
from nibble.serve.shapes import ChatShape, CompletionShape, Usage
from nibble.serve.worker import Answers

_EVENT_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
]


class Reply:
    """The response to a request for answers.

    Args:
        answers: Started; closed once the response is sent or the client has left.
        copies: Answers for each prompt.
        has_usage_chunk: Whether a stream ends with the counts of tokens.
    """

    def __init__(
        self,
        answers: Answers,
        shape: ChatShape | CompletionShape,
        choices: Sequence[Choice],
        *,
        copies: int,
        is_stream: bool,
        has_usage_chunk: bool,
    ) -> None:
        self._answers, self._shape, self._choices = answers, shape, choices
        self._copies, self._has_usage_chunk = copies, has_usage_chunk
        self._send = self._send_stream if is_stream else self._send_whole

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """ASGI."""
        try:
            await _while_connected(receive, self._send(send))
        finally:
            self._answers.close()

    async def _send_whole(self, send: Any) -> None:
        parts: list[list[Part]] = [[] for _ in self._choices]
        try:
            async for number, piece in self._answers:
                parts[number].append(self._choices[number].take(piece))
        except Refusal as refusal:
            await send_refusal(refusal, send)
            return
        body = to_json(self._shape.whole(parts, self._usage()))
        headers = [(b"content-type", b"application/json")]
        headers.append((b"content-length", str(len(body)).encode()))
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _send_stream(self, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": _EVENT_HEADERS})
        for index in range(len(self._choices)):
            first = self._shape.first(index)
            if first is not None:
                await _send_event(send, first)
        try:
            async for number, piece in self._answers:
                part = self._choices[number].take(piece)
                if not part.is_empty:
                    await _send_event(send, self._shape.chunk(number, part))
        except Refusal as refusal:
            await _send_event(send, refusal.to_dict())
        else:
            if self._has_usage_chunk:
                await _send_event(send, self._shape.last(self._usage()))
            await _send_part(send, b"data: [DONE]\n\n")
        await send({"type": "http.response.body", "body": b""})

    def _usage(self) -> Usage:
        handles = self._answers.handles
        prompt = sum(handle.num_prompt_tokens for handle in handles[:: self._copies])
        return Usage(prompt, sum(handle.num_new_tokens for handle in handles))


async def _send_event(send: Any, values: dict[str, Any]) -> None:
    await _send_part(send, b"data: " + to_json(values) + b"\n\n")


async def _send_part(send: Any, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})


async def _while_connected(receive: Any, work: Coroutine[Any, Any, None]) -> None:
    """Do the work unless the client leaves."""
    tasks = [asyncio.ensure_future(each) for each in (work, _disconnected(receive))]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _disconnected(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
