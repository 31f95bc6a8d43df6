"""What is written in 4 bits is what `model.prequantized` reads, bit for bit."""

import pytest
import torch

from nibble.adapter.stored4bit import specs_4bit, tensors_4bit
from nibble.kernels.nf4 import quantize
from nibble.model.prequantized import read_quantized, split_quantized
from nibble.model.tensors import TensorReader, read_entries, tensor_file


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("type_", ["nf4", "fp4"])
@pytest.mark.parametrize(("shape", "block_size"), [((48, 64), 64), ((5, 7), 64), ((40, 96), 128)])
def test_round_trip(tmp_path, double, type_, shape, block_size):
    settings = {"type": type_, "block_size": block_size, "double": double}
    q = quantize(torch.randn(*shape, generator=torch.Generator().manual_seed(0)), **settings)
    with tensor_file(tmp_path / "w", specs_4bit("x.weight", shape, settings)) as write:
        for name, tensor in tensors_4bit("x.weight", q, torch.bfloat16).items():
            write(name, [tensor])
    entries, parts = split_quantized(read_entries(tmp_path / "w"))
    found = read_quantized(entries["x.weight"], parts["x.weight"], TensorReader([]))
    assert (found.shape, found.type, found.block_size) == (q.shape, q.type, q.block_size)
    for name in ("codes", "absmax", "nested_absmax", "offset"):
        ours, theirs = getattr(found, name), getattr(q, name)
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)
