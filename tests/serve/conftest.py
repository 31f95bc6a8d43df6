"""A client of a server whose engine is made up."""

from contextlib import contextmanager

import pytest
from starlette.testclient import TestClient

from nibble.serve.server import make_app

from .fake import fake_service


@contextmanager
def _client_of(service):
    with TestClient(make_app(service), base_url="http://127.0.0.1") as client:
        client.service = service
        yield client


@pytest.fixture
def client():
    """A client of a base and the adapters law and med."""
    with _client_of(fake_service("law", "med")) as client:
        yield client


@pytest.fixture
def client_of():
    """Makes the client of a service."""
    return _client_of
