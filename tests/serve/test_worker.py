"""Pieces come to whoever asked, and what is given up is dropped."""

import asyncio
import time

import pytest

from nibble.serve.refusal import Refusal
from nibble.serve.worker import Ask, Worker

from .fake import FakeAdapters, FakeBatch

SAMPLING = {"max_new_tokens": 50}


def _ask(text, **more):
    return Ask(list(text.encode()), SAMPLING | more, None)


def _run(work, *, num_places=8):
    async def whole():
        worker = Worker(FakeBatch(FakeAdapters()), num_places=num_places)
        worker.start()
        try:
            return await asyncio.wait_for(work(worker), 20)
        finally:
            await worker.end()

    return asyncio.run(whole())


async def _texts(worker, *texts):
    answers = worker.reserve(len(texts))
    try:
        await answers.start([_ask(text) for text in texts])
        found = [""] * len(texts)
        async for number, piece in answers:
            found[number] += piece.text
        return found
    finally:
        answers.close()


def test_answers_of_many_requests_are_made_together():
    async def work(worker):
        asked = [(f"one {n}", f"two {n}") for n in range(4)]
        found = await asyncio.gather(*(_texts(worker, *texts) for texts in asked))
        assert [tuple(each) for each in found] == asked
        assert worker.batch.seen > 2
        assert worker.num_held == 0

    _run(work)


def test_places_are_bounded_and_come_back():
    async def work(worker):
        first = worker.reserve(5)
        with pytest.raises(Refusal) as found:
            worker.reserve(4)
        assert found.value.status == 429
        first.close()
        first.close()
        assert worker.num_held == 0
        worker.reserve(8)
        with pytest.raises(Refusal) as found:
            worker.reserve(9)
        assert found.value.status == 400

    _run(work)


def test_what_is_given_up_is_dropped():
    async def work(worker):
        answers = worker.reserve(2)
        await answers.start([_ask("x" * 40), _ask("y" * 40)])
        answers.close()
        await worker.call(lambda: None)
        assert worker.batch.handles == []

    _run(work)


def test_what_the_engine_does_not_take_is_refused_whole():
    async def work(worker):
        answers = worker.reserve(2)
        with pytest.raises(Refusal) as found:
            await answers.start([_ask("fine"), _ask("")])
        assert found.value.status == 400
        answers.close()
        await worker.call(lambda: None)
        assert worker.batch.handles == []

    _run(work)


def test_a_failed_step_ends_what_ran_and_nothing_else(caplog):
    async def work(worker):
        with pytest.raises(Refusal) as found:
            await _texts(worker, "crash")
        assert found.value.status == 500
        assert await _texts(worker, "fine") == ["fine"]

    _run(work)
    assert "the engine crashed" in caplog.text


def test_a_call_waits_until_it_may_run():
    async def work(worker):
        answers = worker.reserve(1)
        await answers.start([_ask("abcdef")])
        order = []
        later = asyncio.ensure_future(
            worker.call(lambda: order.append("later"), when=lambda: not worker.batch.handles)
        )
        async for _ in answers:
            pass
        order.append("answered")
        await later
        assert set(order) == {"answered", "later"}
        assert worker.batch.handles == []

    _run(work)


def test_a_call_that_fails_is_an_error_of_ours_and_the_thread_goes_on(caplog):
    async def work(worker):
        with pytest.raises(Refusal) as found:
            await worker.call(lambda: 1 / 0)
        assert found.value.status == 500
        assert await worker.call(lambda: 7) == 7

    _run(work)
    assert "ZeroDivisionError" in caplog.text


def test_once_it_stops_everything_is_refused():
    async def work(worker):
        step = worker.batch.step
        worker.batch.step = lambda: time.sleep(0.02) or step()
        answers = worker.reserve(1)
        await answers.start([_ask("crawl " * 9)])
        worker.refuse_all()
        with pytest.raises(Refusal) as found:
            async for _ in answers:
                pass
        assert found.value.status == 503
        for act in (lambda: worker.reserve(1), lambda: asyncio.ensure_future(worker.call(int))):
            with pytest.raises(Refusal):
                await act()

    _run(work)
