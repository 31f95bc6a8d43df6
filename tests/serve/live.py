"""A server on a port of its own, in a thread of this process, and raw sockets to it."""

import asyncio
import json
import socket
import threading
import time
from contextlib import contextmanager

from nibble.serve.start import Door, make_server, serve

TOKEN = "secret"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Live:
    """Talks to a server byte by byte."""

    def __init__(self, service, port):
        self.service, self.port = service, port

    def connect(self, seconds=10.0):
        return socket.create_connection(("127.0.0.1", self.port), timeout=seconds)

    def head(self, path, *, body=b"", method="POST", more=()):
        lines = [
            f"{method} {path} HTTP/1.1",
            f"Host: 127.0.0.1:{self.port}",
            f"Authorization: Bearer {TOKEN}",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
            *more,
        ]
        return ("\r\n".join(lines) + "\r\n\r\n").encode()

    def ask(self, path, values=None, *, method="POST"):
        """Status and body of a whole request."""
        body = b"" if values is None else json.dumps(values).encode()
        return self.raw(
            self.head(path, body=body, method=method, more=["Connection: close"]) + body
        )

    def raw(self, data):
        """Status and body of what the server says to some bytes; 0 if it says nothing."""
        with self.connect() as sock:
            sock.sendall(data)
            return read_answer(sock)

    def is_healthy(self):
        return self.ask("/health", method="GET") == (200, b'{"status":"ok"}')

    def settle(self, seconds=5.0):
        """Wait until nothing is held and nothing runs; whether that came."""
        worker = self.service.worker
        deadline = time.monotonic() + seconds
        while worker.num_held or worker.batch.has_work():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True


def read_answer(sock):
    """All that comes until the other side closes."""
    data = b""
    try:
        while part := sock.recv(65536):
            data += part
    except ConnectionError:
        pass
    head, _, body = data.partition(b"\r\n\r\n")
    return (int(head.split()[1]) if head else 0), body


@contextmanager
def running(service):
    """A server of this service, and its end."""
    sock = socket.create_server(("127.0.0.1", 0))
    server = make_server(service, Door(sock, TOKEN, LOOPBACK))
    thread = threading.Thread(target=asyncio.run, args=(serve(server, service, sock),))
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield Live(service, sock.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(15)
    assert not thread.is_alive()
