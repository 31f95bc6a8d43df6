"""Triton kernels without a GPU: parity by its interpreter, and what happens without Triton."""

import importlib.util
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nibble.kernels import nf4, triton_support

HERE = Path(__file__).parent
CUDA = torch.device("cuda", 0)
has_triton = importlib.util.find_spec("triton") is not None


@pytest.mark.skipif(not has_triton, reason="needs Triton")
@pytest.mark.parametrize("module", ["test_nf4_triton.py"])
def test_parity_by_the_interpreter(module):
    # In a process of its own: Triton reads the variable when it is imported.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(HERE / module)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout.splitlines()[-1] or "passed" in done.stdout


@pytest.fixture
def warnings(monkeypatch, caplog):
    """What `is_right` warns of on a machine that seems to have a CUDA device."""
    monkeypatch.delenv("NIBBLE_NO_COMPILE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(logging.getLogger("nibble"), "propagate", True)
    return lambda: [record.getMessage() for record in caplog.records]


def test_kernels_that_agree_are_used(warnings):
    assert triton_support.is_right(lambda device: True, CUDA, what="norms")
    assert not warnings()


def test_other_values_are_named_in_one_warning(warnings):
    assert not triton_support.is_right(lambda device: False, CUDA, what="norms")
    (message,) = warnings()
    assert message == (
        "norms use the slow torch reference: Triton kernels do not agree with it on cuda:0; "
        "report this"
    )


def test_without_triton_one_warning_says_so(warnings):
    def agrees(device):
        raise ModuleNotFoundError("No module named 'triton'")

    assert not triton_support.is_right(agrees, CUDA, what="norms")
    (message,) = warnings()
    assert "ModuleNotFoundError: No module named 'triton'" in message


def test_nothing_is_compiled_against_the_users_will(warnings, monkeypatch):
    monkeypatch.setenv("NIBBLE_NO_COMPILE", "1")
    assert not triton_support.is_right(lambda device: True, CUDA, what="norms")
    assert not warnings()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_name_says_what_is_in_use():
    assert nf4.implementation("cuda") == "torch reference"


def test_kernels_are_imported_without_triton():
    code = (
        "import sys\nsys.modules['triton'] = None\n"
        "from nibble.kernels import layers, nf4, nf4_triton, rotary"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
