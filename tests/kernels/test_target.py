"""The seam between the code and the device it runs for."""

import torch

from nibble.kernels import target


def test_a_planned_device_takes_the_place_of_the_real_one():
    x = torch.ones(2)
    assert target.device_type(x) == target.device_type(x.device) == "cpu"
    with target.planned_device("cuda"):
        assert target.device_type(x) == "cuda"
    assert target.device_type(x) == "cpu"


def test_host_memory_is_marked_while_it_is_allocated():
    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            marks.append(target.is_host_allocation())
            return func(*args, **(kwargs or {}))

    marks = []
    with Seen():
        page = target.host_empty(3, 4, dtype=torch.bfloat16)
        torch.empty(2)
    assert page.shape == (3, 4)
    assert page.dtype == torch.bfloat16
    assert marks == [True, False]
