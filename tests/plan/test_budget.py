"""What is left for tensors on a device, and what stands beside them."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nibble.plan.budget import (
    CONTEXT_BYTES,
    CPU_SCRATCH_BYTES,
    EARLIER_WORKSPACE_BYTES,
    FRAGMENTATION_SHARE,
    HOPPER_WORKSPACE_BYTES,
    budget_bytes,
    margin_bytes,
    workspace_bytes,
)
from nibble.plan.devices import DEVICES, find_device
from nibble.plan.tracker import Peak
from nibble.plan.watch import ADAPTERS, BASE_4BIT, HEAD, MOMENTS, SAVED, WORKING

GIB = 2**30


def test_a_gpu_gives_all_but_its_context():
    assert budget_bytes(find_device("24GiB")) == 24 * GIB - CONTEXT_BYTES


def test_the_cpu_gives_all():
    cpu = replace(find_device("cpu"), memory_bytes=5 * GIB)
    assert budget_bytes(cpu) == 5 * GIB


def test_several_devices_offer_as_much_as_one():
    assert budget_bytes(find_device("8x A100 80GB")) == budget_bytes(find_device("A100 80GB"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("T4", EARLIER_WORKSPACE_BYTES),
        ("RTX 4090", EARLIER_WORKSPACE_BYTES),
        ("H100", HOPPER_WORKSPACE_BYTES),
        ("B200", HOPPER_WORKSPACE_BYTES),
        ("RTX 5090", HOPPER_WORKSPACE_BYTES),
        ("24GiB", HOPPER_WORKSPACE_BYTES),
        ("cpu", CPU_SCRATCH_BYTES),
    ],
)
def test_libraries_keep_more_from_hopper_on_and_on_what_is_unknown(name, expected):
    assert workspace_bytes(find_device(name)) == expected


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_every_card_has_room_for_a_run(device):
    assert budget_bytes(device) > 50 * workspace_bytes(device)


@pytest.mark.parametrize("part", [SAVED, WORKING, HEAD])
def test_holes_are_a_share_of_what_comes_and_goes(part):
    peak = Peak(3000, {part: 1000, BASE_4BIT: 2000})
    assert margin_bytes(peak) == int(FRAGMENTATION_SHARE * 1000)


def test_what_stays_leaves_no_holes():
    assert margin_bytes(Peak(6000, {BASE_4BIT: 3000, ADAPTERS: 2000, MOMENTS: 1000})) == 0
    assert margin_bytes(Peak()) == 0


parts = st.dictionaries(st.sampled_from([SAVED, WORKING, HEAD, BASE_4BIT]), st.integers(0, 10**12))


@given(parts)
def test_the_margin_is_a_small_share_of_the_peak(parts):
    peak = Peak(sum(parts.values()), parts)
    assert 0 <= margin_bytes(peak) <= FRAGMENTATION_SHARE * peak.bytes
