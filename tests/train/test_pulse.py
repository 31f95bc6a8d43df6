"""A rank that is silent, or says why it ends, is noticed by the others."""

import time

import pytest

from nibble.train import pulse
from nibble.train.pulse import Pulse


class Store:
    """Key and value of all ranks, in this process."""

    def __init__(self):
        self.values = {}
        self.is_gone = False

    def set(self, key, value):
        self.check([])
        self.values[key] = value.encode()

    def get(self, key):
        return self.values[key]

    def check(self, keys):
        if self.is_gone:
            raise RuntimeError("connection closed")
        return all(key in self.values for key in keys)

    def compare_set(self, key, expected, desired):
        self.check([])
        self.values.setdefault(key, desired.encode())


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(pulse, "BEAT_SECONDS", 0.01)
    monkeypatch.setattr(pulse, "SILENCE_SECONDS", 0.3)
    monkeypatch.setattr(pulse, "GRACE_SECONDS", 0.1)


@pytest.fixture
def pair():
    store, left = Store(), [[], []]
    pulses = [Pulse(store, rank, 2, leave=left[rank].append) for rank in (0, 1)]
    for each in pulses:
        each.start()
    yield store, pulses, left
    for each in pulses:
        each.stop()


def _soon(is_so):
    give_up = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < give_up
        time.sleep(0.01)


def test_ranks_that_beat_go_on(pair):
    _, pulses, left = pair
    time.sleep(0.6)
    assert [each.lost for each in pulses] == ["", ""]
    assert left == [[], []]


def test_a_silent_rank_is_given_up(pair):
    _, pulses, left = pair
    pulses[1].stop()
    _soon(lambda: left[0])
    assert pulses[0].lost == "rank 1 has not been heard of for 0.3 s" == left[0][0]
    assert left[1] == []


def test_a_reason_is_heard_and_the_first_one_stands(pair):
    _, pulses, left = pair
    pulses[1].tell("rank 1 ended: the disk is full")
    pulses[1].tell("another reason")
    assert pulses[0].reason(10) == "rank 1 ended: the disk is full"
    assert left[0] == []


def test_nothing_is_lost_within_the_time(pair):
    _, pulses, _ = pair
    assert pulses[0].reason(0.05) == ""


def test_a_store_that_is_gone_ends_all(pair):
    store, pulses, left = pair
    store.is_gone = True
    _soon(lambda: left[0] and left[1])
    assert "the machine of rank 0 cannot be reached" in pulses[1].lost


def test_one_that_ends_in_time_is_left_alone(pair, monkeypatch):
    _, pulses, left = pair
    monkeypatch.setattr(pulse, "GRACE_SECONDS", 5)
    pulses[1].stop()
    _soon(lambda: pulses[0].lost)
    pulses[0].stop()
    assert left[0] == []


def test_leaving_says_why_and_that_it_can_go_on(monkeypatch, capsys):
    codes = []
    monkeypatch.setattr(pulse.os, "_exit", codes.append)
    pulse._leave("rank 1 has not been heard of")
    assert codes == [75]
    assert "rank 1 has not been heard of; run the same command again" in capsys.readouterr().err
