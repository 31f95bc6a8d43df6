"""Who gets in, and how much of a body is read."""

import asyncio

import pytest
from starlette.testclient import TestClient

from nibble.serve.guard import Guard, read_body
from nibble.serve.limits import Limits
from nibble.serve.refusal import Refusal
from nibble.serve.server import make_app

from .fake import fake_service

JSON = {"content-type": "application/json"}


def _client(*, token="secret", any_address=False, host="127.0.0.1:8000"):
    app = Guard(
        make_app(fake_service()), token=token, hosts=("localhost", "127.0.0.1", "::1", "Box.local"),
        any_address=any_address,
    )  # fmt: skip
    return TestClient(app, base_url=f"http://{host}")


@pytest.mark.parametrize(
    ("given", "status"),
    [
        (None, 401),
        ("secret", 401),
        ("Basic secret", 401),
        ("Bearer", 401),
        ("Bearer secre", 401),
        ("Bearer secret2", 401),
        ("Bearer secret", 200),
        ("bearer  secret", 200),
    ],
)
def test_the_token_is_asked_for(given, status):
    headers = {} if given is None else {"Authorization": given}
    with _client() as client:
        response = client.get("/v1/models", headers=headers)
        assert response.status_code == status
        if status == 401:
            assert response.headers["www-authenticate"] == "Bearer"
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert "secret" not in response.text
        # Who has no token does not learn what there is.
        assert client.get("/nothing", headers=headers).status_code == (
            404 if status == 200 else 401
        )


def test_health_needs_no_token_and_none_may_be_asked_for():
    with _client() as client:
        assert client.get("/health").status_code == 200
    with _client(token=None) as client:
        assert client.get("/v1/models").status_code == 200


@pytest.mark.parametrize(
    ("host", "is_known"),
    [
        ("127.0.0.1", True),
        ("127.0.0.1:1", True),
        ("LOCALHOST:8000", True),
        ("box.local", True),
        ("[::1]:8000", True),
        ("evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("10.0.0.1", False),
        ("", False),
    ],
)
def test_the_host_must_be_a_name_of_the_server(host, is_known):
    with _client(token=None) as client:
        response = client.get("/health", headers={"Host": host})
        assert response.status_code == (200 if is_known else 403)


def test_any_address_is_a_name_where_the_network_is_let_in():
    with _client(token=None, any_address=True) as client:
        for host, status in (("10.0.0.1:80", 200), ("[fe80::1]", 200), ("evil.example", 403)):
            assert client.get("/health", headers={"Host": host}).status_code == status


def test_no_web_page_of_another_origin_is_let_in():
    with _client(token=None) as client:
        asked = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
        response = client.options("/v1/completions", headers=asked)
        assert response.status_code == 405
        assert "access-control-allow-origin" not in response.headers
        form = client.post("/v1/completions", content=b"{}", headers={"Content-Type": "text/plain"})
        assert form.status_code == 415


def _read(parts, *, headers=JSON, limits=None, seconds=0.0):
    messages = iter(parts)

    async def receive():
        await asyncio.sleep(seconds)
        return next(messages)

    return asyncio.run(read_body(headers, receive, limits or Limits(body_bytes=10)))


def _part(body, more=False):
    return {"type": "http.request", "body": body, "more_body": more}


def _refusal(*args, **options):
    with pytest.raises(Refusal) as found:
        _read(*args, **options)
    return found.value


def test_a_body_comes_in_parts():
    kinds = ("application/json", "Application/JSON; charset=utf-8")
    for kind in kinds:
        headers = {"content-type": kind}
        assert _read([_part(b"ab", True), _part(b"cd")], headers=headers) == b"abcd"


def test_a_body_that_is_too_large_is_refused_however_it_comes():
    assert _read([_part(b"x" * 10)]) == b"x" * 10
    assert _refusal([_part(b"x" * 11)]).status == 413
    assert _refusal([_part(b"x" * 6, True), _part(b"x" * 6)]).status == 413
    # It does not go on for ever.
    assert _refusal([_part(b"x" * 6, True)] * 30).status == 413


def test_a_body_that_does_not_come_is_given_up():
    found = _refusal([_part(b"x", True)] * 99, limits=Limits(read_seconds=0.05), seconds=0.02)
    assert found.status == 408
    assert found.headers == {"Connection": "close"}
    assert _refusal([_part(b"x", True), {"type": "http.disconnect"}]).code == "disconnected"
