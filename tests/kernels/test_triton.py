"""Triton kernels without a GPU: parity by its interpreter, and what happens without Triton."""

import importlib.util
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nibble.kernels import cross_entropy, layers_triton, nf4, triton_support
from nibble.kernels.layers import gated, rms_norm
from nibble.kernels.library import library_for
from nibble.kernels.rotary import rotary
from nibble.kernels.target import planned_device

HERE = Path(__file__).parent
CUDA = torch.device("cuda", 0)
has_triton = importlib.util.find_spec("triton") is not None


@pytest.mark.skipif(not has_triton, reason="needs Triton")
@pytest.mark.parametrize("module", ["test_nf4_triton.py", "test_layers_triton.py"])
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


def test_a_plan_for_cuda_counts_on_triton(monkeypatch):
    monkeypatch.setattr(triton_support, "launch", None)
    bytes_moved = []
    planned = planned_device("cuda", on_kernel=lambda *told: bytes_moved.append(told[2]))
    with planned, FakeTensorMode():
        x = torch.empty(6, 32, dtype=torch.bfloat16, requires_grad=True)
        assert isinstance(library_for(x), layers_triton.Library)
        assert library_for(x, torch.empty(32)) is None
        gated(rms_norm(x, x[0].detach(), 1e-6, unit_offset=False), x, "silu").sum().backward()
        query, cos = torch.empty(1, 2, 6, 16, dtype=x.dtype), torch.empty(1, 6, 16, dtype=x.dtype)
        rotary(query, query, cos, cos)
    wide, row = x.nbytes, 32 * 2
    norm, rotation = 2 * wide + row + 6 * 4, 2 * query.nbytes + 2 * cos.nbytes
    assert bytes_moved == [norm, 3 * wide, 5 * wide, norm + wide, rotation, rotation]


def test_a_plan_against_the_users_will_counts_on_torch(monkeypatch):
    monkeypatch.setenv("NIBBLE_NO_COMPILE", "1")
    with planned_device("cuda"), FakeTensorMode():
        assert library_for(torch.empty(2, 3)) is None


def test_a_plan_for_cuda_has_no_logits_in_float32():
    class Allocated(torch.utils._python_dispatch.TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.largest = max(self.largest, result.untyped_storage().nbytes())
            return result

    with planned_device("cuda"), FakeTensorMode(), Allocated() as allocated:
        logits = torch.empty(256, 1000, dtype=torch.bfloat16)
        labels = torch.empty(256, dtype=torch.int64)
        cross_entropy._loss_and_gradient_(logits, labels, cross_entropy._Shape(None, 1.0))
    assert allocated.largest == logits.nbytes
