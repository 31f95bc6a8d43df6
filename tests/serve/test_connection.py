"""Clients that are silent, slow, too many or broken, on real sockets."""

import json
import time

import pytest

from nibble.serve.limits import Limits

from .fake import fake_service
from .live import TOKEN, read_answer, running

TEXT = {"model": "base", "prompt": "abc"}


@pytest.fixture(scope="module")
def live():
    """A server that waits two seconds for slow clients and takes eight connections."""
    with running(fake_service(limits=Limits(read_seconds=1.5, connections=8))) as live:
        yield live
        assert live.is_healthy()
        assert live.settle()


def test_an_answer_comes(live):
    status, body = live.ask("/v1/completions", TEXT)
    assert (status, json.loads(body)["choices"][0]["text"]) == (200, "abc")


@pytest.mark.parametrize("start", [b"", b"GET /hea", b"GET /health HTTP/1.1\r\nHost: x\r\n"])
def test_a_head_that_does_not_become_whole_ends(live, start):
    begun = time.monotonic()
    with live.connect() as sock:
        sock.sendall(start)
        assert read_answer(sock)[0] == 0
    assert 1 < time.monotonic() - begun < 6


def test_a_body_that_drips_is_refused(live):
    body = json.dumps(TEXT).encode()
    with live.connect() as sock:
        sock.sendall(live.head("/v1/completions", body=body) + body[:5])
        assert read_answer(sock)[0] == 408


def test_an_idle_connection_that_is_used_stays(live):
    """Longer than a silent one would, with nothing wrong."""
    request = live.head("/health", method="GET")
    with live.connect() as sock, sock.makefile("rb") as answers:
        for _ in range(12):
            sock.sendall(request)
            assert answers.readline().startswith(b"HTTP/1.1 200")
            while answers.readline() != b"\r\n":
                pass
            assert answers.read(len(b'{"status":"ok"}')) == b'{"status":"ok"}'
            time.sleep(0.3)


def test_beyond_the_bound_a_connection_is_refused(live):
    held = [live.connect() for _ in range(8)]
    time.sleep(0.1)
    try:
        with live.connect() as sock:
            status, body = read_answer(sock)
        assert (status, json.loads(body)["error"]["code"]) == (429, "too_many")
    finally:
        for sock in held:
            sock.close()
    time.sleep(0.1)
    assert live.is_healthy()


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\x01\x02\r\n\r\n",
        b"nonsense\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
)
def test_broken_http_is_refused(live, data):
    status, _ = live.raw(data)
    assert status == 0 or 400 <= status < 500


def test_a_body_in_broken_chunks_is_refused(live):
    head = live.head("/v1/completions").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    status, _ = live.raw(head + b"zz\r\nnope")
    assert status in (0, 400)


def test_a_client_that_leaves_in_mid_stream_drops_its_answer(live):
    worker = live.service.worker
    batch, step = worker.batch, worker.batch.step

    def slow_step():
        time.sleep(0.02)
        return step()

    batch.step = slow_step
    try:
        for is_stream in (True, False):
            values = TEXT | {"prompt": "x" * 400, "max_tokens": 100, "stream": is_stream, "n": 2}
            body = json.dumps(values).encode()
            with live.connect() as sock:
                sock.sendall(live.head("/v1/completions", body=body) + body)
                deadline = time.monotonic() + 5
                while len(batch.handles) < 2 and time.monotonic() < deadline:
                    time.sleep(0.01)
                assert len(batch.handles) == 2
                if is_stream:
                    sock.recv(100)
            assert live.settle(1)
    finally:
        del batch.step


def test_a_client_that_does_not_read_its_answer_is_left(live):
    values = TEXT | {
        "prompt": "x" * 250,
        "max_tokens": 250,
        "stream": True,
        "n": 128,
        "logprobs": 3,
    }
    body = json.dumps(values).encode()
    with live.connect() as sock:
        sock.sendall(live.head("/v1/completions", body=body) + body)
        assert live.settle(20)


def test_the_token_is_needed_on_a_real_connection(live):
    request = live.head("/v1/models", method="GET", more=["Connection: close"])
    assert live.raw(request)[0] == 200
    assert live.raw(request.replace(TOKEN.encode(), b"other"))[0] == 401
