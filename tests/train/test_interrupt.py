"""Signals end a run in order: at once before the loop, after the step at work within it."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from nibble.errors import RunInterrupted, StoppedError
from nibble.train import interrupt
from nibble.train.interrupt import Asked, stop_signals

KINDS = {
    signal.SIGINT: (RunInterrupted, 130),
    signal.SIGTERM: (StoppedError, 75),
    signal.SIGUSR1: (StoppedError, 75),
    signal.SIGHUP: (StoppedError, 75),
}


@pytest.fixture(autouse=True)
def not_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def _send(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", KINDS)
def test_before_the_loop_a_signal_ends_at_once(number):
    kind, exit_code = KINDS[number]
    match = f"stopped by {number.name}; nothing was trained this time"
    with pytest.raises(kind, match=match) as error, stop_signals():
        _send(number)
    assert error.value.exit_code == exit_code
    assert "run the same command again" in error.value.fix


def test_a_terminal_that_goes_ends_no_run_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals() as stop:
            _send(signal.SIGHUP)
            assert not stop.name
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", KINDS)
def test_in_the_loop_the_step_at_work_is_finished(number):
    done = []
    with stop_signals() as stop, stop.patience(60):
        _send(number)
        done.append("step")
    assert (stop.name, done) == (number.name, ["step"])
    stop.standing = "step 1 of 3 is saved"
    assert isinstance(stop.error(), KINDS[number][0])
    assert "step 1 of 3 is saved" in stop.error().what


@pytest.mark.parametrize("second", KINDS)
@pytest.mark.parametrize("first", KINDS)
def test_a_second_signal_ends_at_once(first, second, monkeypatch):
    if first == second != signal.SIGINT:
        monkeypatch.setattr(interrupt, "_ECHO_SECONDS", 0)
    with pytest.raises(KINDS[second][0]), stop_signals() as stop, stop.patience(60):
        _send(first, second)


@pytest.mark.parametrize("number", [number for number in KINDS if number != signal.SIGINT])
def test_a_signal_that_comes_by_several_ways_counts_once(number):
    with stop_signals() as stop, stop.patience(60):
        _send(number, number, number)
    assert stop.name == number.name


def test_before_the_loop_an_echo_does_not_disturb_the_end():
    ended = []

    def end_in_order():
        try:
            _send(signal.SIGTERM)
        finally:
            _send(signal.SIGTERM)
            ended.append("in order")

    with pytest.raises(StoppedError), stop_signals():
        end_in_order()
    assert ended == ["in order"]


def test_after_the_loop_a_signal_ends_at_once():
    def loop_and_signal(stop):
        with stop.patience(60):
            pass
        _send(signal.SIGINT)

    with pytest.raises(RunInterrupted), stop_signals() as stop:
        loop_and_signal(stop)


def test_the_handlers_of_before_are_back():
    before = {number: signal.getsignal(number) for number in KINDS}
    with stop_signals():
        assert signal.getsignal(signal.SIGTERM) != before[signal.SIGTERM]
    assert {number: signal.getsignal(number) for number in KINDS} == before


def test_items_end_once_a_run_is_asked_to_stop():
    taken = []

    def take(stop):
        for item in stop.until_asked(range(5)):
            taken.append(item)
            if item == 2:
                _send(signal.SIGINT)

    with stop_signals() as stop, stop.patience(60), pytest.raises(Asked):
        take(stop)
    assert taken == [0, 1, 2]


def test_a_thread_of_a_notebook_leaves_signals_alone():
    def run():
        with stop_signals() as stop, stop.patience(60):
            names.append(stop.name)

    names = []
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert names == [""]


def _child(code):
    code = (
        "import os, signal, time\nfrom nibble.train.interrupt import stop_signals\n"
        f"with stop_signals() as stop:\n    stop.standing = 'step 2 of 6 is saved'\n{code}"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_a_step_that_hangs_is_not_waited_for():
    done = _child(
        "    with stop.patience(0.3):\n        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        time.sleep(50)"
    )
    assert done.returncode == 75
    assert done.stderr == "nibble: the step took too long to finish; step 2 of 6 is saved\n"


def test_a_run_that_ended_in_time_is_left_alone():
    done = _child(
        "    with stop.patience(0.3):\n        os.kill(os.getpid(), signal.SIGTERM)\n"
        "time.sleep(0.8)"
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_sigint_is_waited_for_as_long_as_it_takes():
    done = _child(
        "    with stop.patience(0.1):\n        os.kill(os.getpid(), signal.SIGINT)\n"
        "        time.sleep(0.5)"
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_what_another_rank_was_asked_is_heard():
    with stop_signals() as stop, stop.patience(60):
        stop.agree = lambda number: max(number, signal.SIGTERM)
        assert not stop.name
        assert stop.asked()
        assert stop.name == "SIGTERM"
    assert isinstance(stop.error(), StoppedError)


@pytest.mark.parametrize("number", KINDS)
def test_what_another_rank_was_asked_may_come_here_too(number):
    with stop_signals() as stop, stop.patience(60):
        stop.agree = lambda _: number
        assert stop.asked()
        _send(number)
    assert stop.name == number.name
