"""Signals that stop a run."""

import os
import signal
import time

from nibble.train.interrupt import stop_signals


def test_a_process_outlives_a_run_that_was_stopped_in_time(monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    with stop_signals() as stop, stop.patience(0.05):
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.2)
    assert (stop.name, ended) == ("SIGTERM", [])


def test_a_process_ends_when_the_step_takes_too_long(monkeypatch, capsys):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    with stop_signals() as stop, stop.patience(0.05):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)
    assert ended == [75]
    assert "took too long" in capsys.readouterr().err
