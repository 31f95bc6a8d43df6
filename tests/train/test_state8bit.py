"""Moments in 8 bits: the maps, the nearest code, the bytes, and what training makes of them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nibble.train.optimizer import AdamW, ParameterGroup
from nibble.train.paging import count_bytes
from nibble.train.state8bit import (
    BLOCK_SIZE,
    SIGNED_MAP,
    UNSIGNED_MAP,
    BlockCode,
    Moments8,
    Moments32,
    midpoints,
)

CPU = torch.device("cpu")
MAPS = {"exp_avg": SIGNED_MAP, "exp_avg_sq": UNSIGNED_MAP}

sizes = st.integers(1, 3 * BLOCK_SIZE)
seeds = st.integers(0, 2**31)
decades = st.integers(-30, 30)


def _joined(pieces):
    return {name: torch.cat(parts) for name, parts in pieces.items()}


def _values(size, seed, decade, is_signed):
    """Magnitudes over eight decades below 10^decade."""
    generator = torch.Generator().manual_seed(seed)
    magnitude = 10 ** (decade - 8 * torch.rand(size, generator=generator, dtype=torch.float64))
    sign = torch.randint(0, 2, (size,), generator=generator) * 2 - 1
    return (magnitude * sign if is_signed else magnitude).float()


def _encode(exp_avg, exp_avg_sq):
    format = Moments8(CPU)
    size = exp_avg.numel()
    parts = {p.name: torch.zeros(p.count(size), dtype=p.dtype) for p in format.parts}
    format.encode(exp_avg, exp_avg_sq, parts)
    return format, parts


@pytest.mark.parametrize(("is_signed", "ours"), [(True, SIGNED_MAP), (False, UNSIGNED_MAP)])
def test_maps_are_those_of_bitsandbytes(is_signed, ours):
    functional = pytest.importorskip("bitsandbytes.functional")
    theirs = functional.create_dynamic_map(signed=is_signed, max_exponent_bits=7, total_bits=8)
    torch.testing.assert_close(torch.tensor(ours), theirs.cpu().float(), rtol=1e-6, atol=0)
    assert len(set(ours)) == 256


@settings(deadline=None, max_examples=50)
@given(sizes, seeds, decades)
def test_every_value_takes_the_nearest_code(size, seed, decade):
    moments = [_values(size, seed, decade, is_signed) for is_signed in (True, False)]
    format, parts = _encode(*moments)
    for name, values, got in zip(MAPS, moments, format.decode(parts), strict=True):
        scale = parts[f"{name}.scale"].repeat_interleave(BLOCK_SIZE)[:size].double()
        map = torch.tensor(MAPS[name], dtype=torch.float64)
        map = map if name == "exp_avg" else map[1:]
        best = ((values.double() / scale)[:, None] - map).abs().amin(1)
        error = ((got.double() - values.double()) / scale).abs()
        assert (error <= best + 1e-7).all()
        is_largest = values.double() == scale
        assert torch.equal(got[is_largest], values[is_largest])


@settings(deadline=None, max_examples=50)
@given(sizes, seeds, decades)
def test_quantising_twice_changes_nothing(size, seed, decade):
    format, parts = _encode(
        *(_values(size, seed, decade, is_signed) for is_signed in (True, False))
    )
    _, again = _encode(*format.decode(parts))
    assert all(torch.equal(parts[name], again[name]) for name in parts)


def test_blocks_of_zeros_and_of_subnormals():
    format, parts = _encode(torch.zeros(300), torch.full((300,), 1e-40))
    assert all((moment == 0).all() for moment in format.decode(parts))


def test_a_second_moment_above_zero_stays_above_zero():
    values = torch.tensor([1.0, 1e-12, 0.0])
    format, parts = _encode(values, values)
    _, exp_avg_sq = format.decode(parts)
    assert exp_avg_sq[1] == pytest.approx(UNSIGNED_MAP[1])
    assert exp_avg_sq[2] == 0


def test_a_scale_belongs_to_256_values():
    values = torch.cat([torch.full((256,), 2.0), torch.full((1,), -3.0)])
    code = BlockCode(SIGNED_MAP, midpoints(SIGNED_MAP), CPU)
    codes, scale_N = code.quantize(values)
    assert scale_N.tolist() == [2.0, -3.0]
    assert torch.equal(code.dequantize(codes, scale_N), values)


@pytest.mark.parametrize("map", [SIGNED_MAP, UNSIGNED_MAP])
def test_the_table_of_cells_agrees_with_a_search(map):
    """At both ends of every cell, and at and beside every bound."""
    bounds = torch.tensor(midpoints(map))
    cells = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32) << 16
    ends = torch.cat([cells, cells | 0xFFFF]).view(torch.float32)
    beside = [torch.nextafter(bounds, torch.tensor(end)) for end in (-2.0, 2.0)]
    values = torch.cat([ends[ends.abs() <= 1], bounds, *beside])
    got = BlockCode(map, bounds.tolist(), CPU)._nearest(values)
    assert torch.equal(got.int(), torch.bucketize(values, bounds, out_int32=True))


def test_bytes_per_value():
    parameter = nn.Parameter(torch.zeros(100 * BLOCK_SIZE))
    for bits, expected in ((32, 8.0), (8, 2 + 8 / 256)):
        state = _joined(AdamW([ParameterGroup((parameter,))], bits=bits).moments.pieces())
        measured = sum(tensor.nbytes for tensor in state.values()) / parameter.numel()
        assert measured == expected
        format = Moments8(CPU) if bits == 8 else Moments32()
        assert count_bytes(format.parts, parameter.numel()) / parameter.numel() == expected


def _regression(bits, num_steps=200):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 8))
    teacher = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 8))
    x = torch.randn(512, 64)
    y = teacher(x).detach()
    optimizer = AdamW([ParameterGroup(tuple(model.parameters()))], bits=bits)
    losses = []
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step(1e-3)
        losses.append(loss.item())
    return losses


def test_training_reaches_the_loss_of_32_bits():
    wide, narrow = _regression(32), _regression(8)
    assert narrow[-1] == pytest.approx(wide[-1], rel=0.05)
    assert narrow[-1] < wide[0] / 10
