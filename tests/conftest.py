"""Fixtures that several rooms share."""

import os
from pathlib import Path

# Spin barriers on a busy machine turn a 0.1 s step into seconds.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real models and data beside the project; skips where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("needs the folder ../shared with real models and data")
    return SHARED
