"""Weights on disk as matrices: one tensor or many, whole or in blocks."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from safetensors.torch import save_file

from nibble.adapter import weights
from nibble.adapter.weights import Base, Weight, quantize_rows, weight_of
from nibble.errors import ModelError
from nibble.kernels.nf4 import quantize
from nibble.model.names import Target
from nibble.model.tensors import read_entries


@pytest.fixture
def stored(tmp_path):
    """Writes tensors and gives their entries in the order given."""

    def store(*tensors):
        names = [f"t{number}" for number in range(len(tensors))]
        save_file(dict(zip(names, tensors, strict=True)), tmp_path / "w.safetensors")
        entries = read_entries(tmp_path / "w.safetensors")
        return [entries[name] for name in names]

    return store


def _random(*shape, dtype=torch.bfloat16, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _joined(readers, order):
    return torch.cat([readers[number]() for number in order])[None]


@pytest.mark.parametrize("shape", [(7,), (6, 5), (3, 4, 5)])
def test_a_tensor_is_a_matrix_of_its_last_dimension(stored, shape):
    value = _random(*shape)
    weight = weight_of(Target("x", tuple(stored(value))), shape)
    matrix = value.reshape(-1, shape[-1])
    assert (weight.num_rows, weight.width) == tuple(matrix.shape)
    for first in range(weight.num_rows):
        for stop in range(first + 1, weight.num_rows + 1):
            assert torch.equal(weight.read(first, stop), matrix[first:stop])


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_experts_are_runs_of_rows(stored, order):
    values = [_random(rows, 4, seed=n) for n, rows in enumerate((2, 3, 2, 3))]
    target = Target("x", tuple(stored(*values)), partial(_joined, order=order), num_parts=2)
    weight = weight_of(target, (2, 5, 4))
    experts = [torch.cat([values[at + number] for number in order]) for at in (0, 2)]
    assert torch.equal(weight.read(0, 10), torch.cat(experts))
    assert torch.equal(weight.read(3, 8), torch.cat(experts)[3:8])
    for number, (_, entry) in enumerate(weight.sources):
        assert torch.equal(weight.read(*weight.rows_of(number)), values[int(entry.name[1:])])


def test_what_mixes_rows_is_refused(stored):
    values = [_random(2, 4, seed=n) for n in range(2)]

    def woven(readers):
        return torch.stack([read() for read in readers], 1).flatten(0, 1)[None]

    with pytest.raises(ModelError, match="one by one"):
        weight_of(Target("x", tuple(stored(*values)), woven), (1, 4, 4))


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("shape", [(12, 64), (7, 48), (64, 3)])
def test_rows_are_quantised_as_the_whole(stored, monkeypatch, shape, search):
    monkeypatch.setattr(weights, "BLOCK_VALUES", 128)
    value = _random(*shape)
    weight = weight_of(Target("x", tuple(stored(value))), shape)
    settings = {"type": "nf4", "block_size": 64, "double": True, "search": search}
    found, expected = quantize_rows(weight, weight.read, settings), quantize(value, search=search)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.absmax, expected.absmax)
    base = Base(weight, torch.bfloat16, found)
    assert torch.equal(
        torch.cat([base.rows(*block) for block in weight.blocks(0, shape[0])]),
        weights.dequantize(expected, dtype=torch.bfloat16).float(),
    )


def test_blocks_are_small_and_complete():
    weight = Weight("x", (10_000, 3000), ())
    blocks = list(weight.blocks(5, 10_000))
    assert blocks[0][0] == 5
    assert blocks[-1][1] == 10_000
    assert all(a[1] == b[0] for a, b in pairwise(blocks))
    assert max(b - a for a, b in blocks) * 3000 <= weights.BLOCK_VALUES
