"""Requests of every kind, from a seed: valid, wrong in one place, and no requests at all."""

import json
import random
import socket
import time
from contextlib import suppress

PATHS = (
    "/v1/chat/completions", "/v1/completions", "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter", "/v1/models", "/v1/models/base", "/health", "/v1/nothing", "/",
)  # fmt: skip
METHODS = ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH")
# By field: values that are taken, sometimes alone, and values that are not.
FIELDS = {
    "temperature": [0, 0.0, 1, 0.7, 2, None, -1, 3, "1", True, 1e-300, 1e308, [], {}],
    "top_p": [1, 0.5, 1e-9, None, 0, -1, 2, "a", False],
    "top_k": [0, 1, 5, -1, None, 2**70, -7, 1.5],
    "seed": [0, 1, -1, 2**62, None, 2**63, 1.5, "x"],
    "stop": ["a", ["e", " "], [], None, "", [""], ["a"] * 5, 3, "x" * 1001, "\u00e9", "\0"],
    "n": [1, 2, 3, None, 0, -1, 129, 1000, "2", True],
    "stream": [True, False, None, 1, "true"],
    "max_tokens": [0, 1, 5, 20, None, -1, 10**6, 2**70, 1.5, "7"],
    "logprobs": [0, 1, 5, True, False, None, 21, -1, "1"],
    "top_logprobs": [0, 1, 20, None, 21, -1, "1"],
    "echo": [True, False, None, 1],
    "stream_options": [{"include_usage": True}, {}, None, {"x": 1}, 3],
    "max_completion_tokens": [1, 5, None, 0, 10**9],
    "user": ["someone", 3, {"a": [1]}],
    "metadata": [{"a": "b"}, None],
    "tools": [[], None, [{"type": "function"}], 3],
    "response_format": [{"type": "text"}, None, {"type": "json_object"}],
    "presence_penalty": [0, 0.0, None, 1, "0"],
    "logit_bias": [{}, None, {"5": 1}],
    "best_of": [1, None, 2],
    "unknown": [1, None, "x"],
    "promt": ["hello"],
}
CONTENTS = (
    "hello", "", " ", "a\0b", "\u00e9\u4e2d\U0001f600", "x" * 3000, "<|im_end|>", "{{ 7 * 7 }}",
    "</s><s>", None, 3, [], [{"type": "text", "text": "hi"}], [{"type": "image_url"}], {"a": 1},
)  # fmt: skip
ROLES = ("user", "assistant", "system", "tool", "developer", "robot", "", None, 7)
PROMPTS = (
    "hello", "Once upon a time", "", "\u00e9\u4e2d", "y" * 2000, ["one", "two"], [5, 6, 7],
    [[5, 6], [7]], [], [[]], [-1], [10**9], [2**70], ["a", 1], None, 3, {"a": 1}, ["x"] * 129,
    "crash",
)  # fmt: skip
BROKEN_BODIES = (
    b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"model": "\\ud800"}', b"[" * 100_000,
    b'{"model": NaN}', b'{"a": ' + b"9" * 5000 + b"}", b"{}" * 3, b'"' + b"x" * 50_000,
)  # fmt: skip
BROKEN_HTTP = (
    b"\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x00\xa5", b"\0" * 300,
    b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET /" + b"a" * 70_000, b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip\r\n\r\n",
    b"GET http://evil.example/ HTTP/1.1\r\nHost: evil.example\r\n\r\n",
    b"CONNECT evil.example:443 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 70_000 + b"\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    b"GET /v1/models/%00%ff%2e%2e HTTP/1.1\r\nHost: localhost\r\n\r\n",
)  # fmt: skip


class Fuzz:
    """Sends requests of every kind and keeps what came back.

    Args:
        connect: Gives a socket to the server.
        folder: Holds adapters that may be loaded.
    """

    def __init__(self, connect, *, token, seed, models=("base",), folder="x"):
        self._connect, self._token, self._rng = connect, token, random.Random(seed)
        self._models, self._folder = models, folder
        self.statuses: dict[int, int] = {}
        self.wrong: list[tuple[int, bytes]] = []

    def one(self):
        """A request of some kind, sent and answered."""
        kind = self._rng.choices(
            ("good", "field", "body", "http", "leave", "method", "auth", "size"),
            (30, 40, 6, 6, 8, 5, 3, 1),
        )[0]
        data = getattr(self, f"_{kind}")()
        try:
            with self._connect() as sock:
                sock.sendall(data)
                if kind == "leave":
                    self._leave_early(sock)
                    return
                if kind == "http":
                    sock.shutdown(socket.SHUT_WR)
                status = self._status(sock)
        except (ConnectionError, TimeoutError) as error:
            if kind not in ("http", "size"):
                self.wrong.append((-1, data[:300] + repr(error).encode()))
            return
        self.statuses[status] = self.statuses.get(status, 0) + 1
        if status >= 500 or (status == 0 and kind not in ("http",)):
            self.wrong.append((status, data[:600]))

    def _status(self, sock):
        data = b""
        while part := sock.recv(65536):
            data = (data + part)[:4000] if data else part[:4000]
        if b'"type":"server_error"' in data:
            return 599
        return int(data.split()[1]) if data else 0

    def _leave_early(self, sock):
        if self._rng.random() < 0.7:
            sock.settimeout(0.3)
            with suppress(TimeoutError):
                sock.recv(self._rng.randint(1, 400))
        if self._rng.random() < 0.5:  # end with a reset instead of a good-bye
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    def _values(self, path):
        pick = self._rng.choice
        if path.endswith("load_lora_adapter"):
            return {"lora_name": pick(["new", "n2"]), "lora_path": self._folder}
        if path.endswith("unload_lora_adapter"):
            return {"lora_name": pick(["new", "n2", "base"])}
        values = {"model": pick(self._models), "max_tokens": self._rng.randint(1, 12)}
        if path.endswith("chat/completions"):
            return values | {"messages": [{"role": "user", "content": "hello there"}]}
        return values | {"prompt": pick(["hello", "one two three", [5, 6, 7], ["a", "b"]])}

    def _path(self):
        return self._rng.choices(PATHS[:4], (45, 45, 5, 5))[0]

    def _good(self):
        path = self._path()
        return self._request(path, json.dumps(self._values(path)).encode())

    def _field(self):
        """One to three fields with values right and wrong."""
        path, pick = self._path(), self._rng.choice
        values = self._values(path)
        for _ in range(self._rng.randint(1, 3)):
            name = pick([*FIELDS, "model", "messages", "prompt", "lora_path"])
            if name == "messages":
                content = [{"role": pick(ROLES), "content": pick(CONTENTS)} for _ in range(3)]
                values[name] = pick([content, content[:1], [], "x", None, [3], content * 20])
            elif name == "prompt":
                values[name] = pick([each for each in PROMPTS if each != "crash"])
            elif name == "model":
                values[name] = pick(["bas", "", None, 3, "x" * 500, "../base"])
            elif name == "lora_path":
                values[name] = pick(["/etc", "../..", "\0", "x" * 5000, "", None, self._folder])
            else:
                values[name] = pick(FIELDS[name])
            if self._rng.random() < 0.05:
                values.pop(pick(list(values)))
        return self._request(path, json.dumps(values).encode())

    def _body(self):
        body = self._rng.choice(BROKEN_BODIES)
        if self._rng.random() < 0.5:
            body = bytearray(json.dumps(self._values(PATHS[0])).encode())
            body[self._rng.randrange(len(body))] = self._rng.randrange(256)
        return self._request(self._path(), bytes(body))

    def _http(self):
        if self._rng.random() < 0.3:
            data = bytearray(self._good())
            for _ in range(3):
                data[self._rng.randrange(min(200, len(data)))] = self._rng.randrange(256)
            return bytes(data)
        return self._rng.choice(BROKEN_HTTP)

    def _leave(self):
        path = self._rng.choice(PATHS[:2])
        values = self._values(path) | {"stream": self._rng.random() < 0.7, "max_tokens": 100}
        return self._request(path, json.dumps(values).encode())

    def _method(self):
        return self._request(self._rng.choice(PATHS), b"{}", method=self._rng.choice(METHODS))

    def _auth(self):
        return self._good().replace(self._token.encode(), self._rng.choice([b"", b"x", b"\xff"]))

    def _size(self):
        size = self._rng.choice([900_000, 1_000_001, 2_000_000])
        return self._request(PATHS[1], json.dumps({"model": "base", "prompt": "z" * size}).encode())

    def _request(self, path, body, *, method="POST"):
        lines = [
            f"{method} {path} HTTP/1.1",
            "Host: 127.0.0.1",
            f"Authorization: Bearer {self._token}",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
            "Connection: close",
        ]
        return ("\r\n".join(lines) + "\r\n\r\n").encode() + body


def drip(connect, token, seconds, *, every_seconds=1.0):
    """A client that sends a body one byte at a time."""
    body = json.dumps({"model": "base", "prompt": "hello"}).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {token}\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode()
    deadline = time.monotonic() + seconds
    with connect() as sock:
        sock.sendall(head)
        for byte in body:
            if time.monotonic() > deadline:
                return
            try:
                sock.sendall(bytes([byte]))
            except ConnectionError:
                return
            time.sleep(every_seconds)
