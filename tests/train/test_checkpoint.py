"""A checkpoint is complete or it is not there."""

import json

import pytest
import torch
from torch import nn

from nibble.errors import DiskError
from nibble.train.checkpoint import NUM_KEPT, STATE_FILE, TrainState, restore, save
from nibble.train.optimizer import AdamW, ParameterGroup


def _optimizer(value=1.0):
    return AdamW([ParameterGroup((nn.Parameter(torch.full((4,), value)),))])


def test_round_trip_with_random_state(tmp_path):
    optimizer = _optimizer(2.0)
    torch.manual_seed(3)
    save(tmp_path, TrainState(5, 100, 1.5), optimizer, identity="x")
    drawn = torch.rand(2)
    other = _optimizer()
    assert restore(tmp_path, other, identity="x") == TrainState(5, 100, 1.5)
    assert torch.equal(torch.rand(2), drawn)
    assert torch.equal(other.state()["group0.value"], torch.full((4,), 2.0))


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("is_paged", [False, True])
def test_restored_and_continued_equals_uninterrupted(tmp_path, bits, is_paged):
    def make():
        parameter = nn.Parameter(torch.linspace(-1, 1, 1300))
        pages = {"is_paged": is_paged, "page_bytes": 65 * bits}
        return AdamW([ParameterGroup((parameter,))], bits=bits, **pages)

    def advance(optimizer, first, last):
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            (parameter,) = optimizer.groups[0].parameters
            parameter.grad.copy_(torch.randn(1300, generator=generator))
            optimizer.step(0.01)
        return optimizer

    whole = advance(make(), 0, 10)
    save(tmp_path, TrainState(5), advance(make(), 0, 5), identity="x")
    other = make()
    restore(tmp_path, other, identity="x")
    state, expected = advance(other, 5, 10).state(), whole.state()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_newest_are_kept(tmp_path):
    for step in range(1, 5):
        save(tmp_path, TrainState(step), _optimizer(), identity="x")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step-00000003", "step-00000004"]
    assert len(names) == NUM_KEPT


@pytest.mark.parametrize("damage", ["flip", "cut", "no manifest", "bad manifest"])
def test_damaged_checkpoint_falls_back(tmp_path, damage):
    for step in (1, 2):
        save(tmp_path, TrainState(step), _optimizer(float(step)), identity="x")
    state = tmp_path / "step-00000002" / STATE_FILE
    manifest = state.with_name("manifest.json")
    content = bytearray(state.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
        state.write_bytes(content)
    elif damage == "cut":
        state.write_bytes(content[:-4])
    elif damage == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text(json.dumps([]))
    assert restore(tmp_path, _optimizer(), identity="x") == TrainState(1)


def test_other_identity_is_not_restored(tmp_path):
    save(tmp_path, TrainState(1), _optimizer(), identity="x")
    assert restore(tmp_path, _optimizer(), identity="y") is None


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="cannot write the checkpoint"):
        save(tmp_path / "file", TrainState(1), _optimizer(), identity="x")
