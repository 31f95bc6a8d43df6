"""One thread that makes the answers, and the bridge between it and the event loop.

    event loop                          thread
    reserve, start     -- calls -->     batch.add
    async for          <-- pieces --    batch.step
    close              -- calls -->     batch.drop

Only the thread touches the batch. What the loop wants of it is a call that waits for the end of
the step at work.
"""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from nibble.errors import NibbleError
from nibble.serve.refusal import Refusal, bad, failed, stopping

_LOG = logging.getLogger(__name__)
Result = TypeVar("Result")


@dataclass(frozen=True)
class Ask:
    """What one answer is asked for: token ids, the fields of `Sampling`, the adapter's name."""

    ids: Sequence[int]
    sampling: Mapping[str, Any]
    adapter: str | None


class Answers:
    """The answers to one request, from its place in the queue to its end.

    Iterating gives (number of the answer, piece) until all have ended.

    Attributes:
        handles: What `Batch.add` returned, in the order that was asked for.
    """

    def __init__(self, worker: "Worker", num_places: int) -> None:
        self.handles: list[Any] = []
        self.num_places = num_places
        self._worker = worker
        self._pieces: asyncio.Queue[tuple[int, Any] | Refusal] = asyncio.Queue()

    async def start(self, asks: Sequence[Ask]) -> None:
        """Put the prompts into the batch.

        Raises:
            Refusal: The engine does not take them.
        """
        await self._worker.call(lambda: self._worker.add(self, asks))

    async def __aiter__(self) -> AsyncIterator[tuple[int, Any]]:
        num_left = len(self.handles)
        while num_left:
            found = await self._pieces.get()
            if isinstance(found, Refusal):
                raise found
            num_left -= found[1].finish is not None
            yield found

    def put(self, found: tuple[int, Any] | Refusal) -> None:
        """Take a piece, or the reason why there will be none; called on the event loop."""
        self._pieces.put_nowait(found)

    def close(self) -> None:
        """Give the places back and drop what has not ended; may be called again."""
        self._worker.release(self)


class Worker:
    """Runs a batch on a thread of its own.

    Args:
        batch: As `nibble.serve.batch.Batch`.
        num_places: Answers that run or wait at a time.
    """

    def __init__(self, batch: Any, *, num_places: int) -> None:
        self.batch = batch
        self.num_places, self.num_held = num_places, 0
        self._calls: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._owners: dict[int, tuple[Any, Answers, int]] = {}
        self._later: list[tuple[Callable[[], bool], Callable[[], None]]] = []
        self._refusal: Refusal | None = None
        self._is_ending = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="nibble-serve", daemon=True)

    # On the event loop.

    def start(self) -> None:
        """Begin; from the event loop that is to get the pieces."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def end(self, wait_seconds: float = 2.0) -> None:
        """End the thread after the step at work; what runs is refused."""
        self._calls.put(self._stop)
        await asyncio.to_thread(self._thread.join, wait_seconds)

    def reserve(self, num_places: int) -> Answers:
        """Places for so many answers.

        Raises:
            Refusal: 429 while there are not enough; 400 if there never are.
        """
        if self._refusal is not None:
            raise self._refusal
        if num_places > self.num_places:
            raise bad(f"{num_places} answers are asked for, at most {self.num_places} are possible")
        if self.num_held + num_places > self.num_places:
            raise Refusal(
                429,
                f"{self.num_held} answers run or wait already; try again soon",
                code="rate_limit_exceeded",
                headers={"Retry-After": "1"},
            )
        self.num_held += num_places
        return Answers(self, num_places)

    def release(self, answers: Answers) -> None:
        """Give places back; the thread drops what still runs."""
        self.num_held -= answers.num_places
        answers.num_places = 0
        self._calls.put(lambda: self._drop(answers))

    async def call(
        self, function: Callable[[], Result], *, when: Callable[[], bool] | None = None
    ) -> Result:
        """What a function gives on the thread between two steps, once `when` is true.

        Raises:
            Refusal: 400 for a `NibbleError`, else 500; 503 while the server stops.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()

        def run() -> None:
            try:
                result = function()
            except Exception as error:
                self._on_loop(_fail, future, _to_refusal(error))
            else:
                self._on_loop(_succeed, future, result)

        if self._refusal is not None:
            raise self._refusal
        self._calls.put(run if when is None else lambda: self._later.append((when, run)))
        return await future

    def refuse_all(self) -> None:
        """End every answer: the server is stopping."""
        self._refusal = stopping()
        self._calls.put(lambda: self._end_all(stopping()))

    # On the thread.

    def add(self, answers: Answers, asks: Sequence[Ask]) -> None:
        """Put prompts into the batch."""
        from nibble.serve.sampling import Sampling

        for number, ask in enumerate(asks):
            sampling = Sampling(**ask.sampling)
            handle = self.batch.add(list(ask.ids), sampling, adapter=ask.adapter)
            answers.handles.append(handle)
            self._owners[id(handle)] = (handle, answers, number)

    def _run(self) -> None:
        while not self._is_ending:
            try:
                self._take_calls()
                if self.batch.has_work():
                    self._step()
            except Exception:
                _LOG.exception("the engine's thread goes on after a failure")

    def _take_calls(self) -> None:
        """All that the loop asked for; waits for it while there is nothing else to do."""
        is_ready = any(when() for when, _ in self._later)
        is_idle = not (self.batch.has_work() or is_ready)
        with suppress(Empty):
            while True:
                self._calls.get(block=is_idle)()
                is_idle = False
        ready = [each for each in self._later if each[0]()]
        self._later = [each for each in self._later if each not in ready]
        for _, run in ready:
            run()

    def _step(self) -> None:
        try:
            pieces = self.batch.step()
        except Exception:
            _LOG.exception("a step of the engine failed; %d answers end", len(self._owners))
            self._end_all(failed())
            return
        found = []
        for piece in pieces:
            key = id(piece.sequence)
            if key in self._owners:
                _, answers, number = self._owners[key]
                found.append((answers, (number, piece)))
                if piece.finish is not None:
                    del self._owners[key]
        if found:
            self._on_loop(_deliver, found)

    def _end_all(self, refusal: Refusal) -> None:
        everyone = {id(answers): answers for _, answers, _ in self._owners.values()}
        for answers in everyone.values():
            self._drop(answers)
        self._on_loop(_deliver, [(answers, refusal) for answers in everyone.values()])

    def _drop(self, answers: Answers) -> None:
        for handle in answers.handles:
            if self._owners.pop(id(handle), None) is not None:
                self.batch.drop(handle)

    def _stop(self) -> None:
        self._end_all(stopping())
        self._is_ending = True

    def _on_loop(self, function: Callable[..., None], *values: Any) -> None:
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop has ended, and nobody waits any more
                self._loop.call_soon_threadsafe(function, *values)


def _deliver(found: Sequence[tuple[Answers, Any]]) -> None:
    for answers, piece in found:
        answers.put(piece)


def _succeed(future: asyncio.Future[Any], result: Any) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[Any], refusal: Refusal) -> None:
    if not future.done():
        future.set_exception(refusal)


def _to_refusal(error: Exception) -> Refusal:
    if isinstance(error, Refusal):
        return error
    if isinstance(error, NibbleError):
        return bad(str(error))
    _LOG.error("a call on the engine's thread failed", exc_info=error)
    return failed()
