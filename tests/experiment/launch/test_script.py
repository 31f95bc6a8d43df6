"""One command on each host: how all of them end, whatever one of them does."""

import shutil
import signal
import subprocess

import pytest

from nibble.config import load_config
from nibble.experiment.launch import slurm, ssh
from nibble.experiment.launch.script import MARK, PATIENCE_SECONDS, RESUMABLE, command_of

from .conftest import UGLY

RENDERED = {
    "slurm": slurm.render,
    "ssh": ssh.render,
}


@pytest.fixture(params=RENDERED)
def script(request, make_job, machines):
    job = make_job(machines.python, workdir=str(machines.work), hosts=("gpu-0", "gpu-1"))
    machines.job = job
    return RENDERED[request.param](job)


def test_it_says_who_wrote_it(script):
    assert script.splitlines()[:2] == ["#!/bin/bash", MARK]
    assert RESUMABLE == 75


def test_every_machine_gets_the_words_as_they_are(script, machines):
    assert machines.run(script) == 0
    for rank in (0, 1):
        workdir, nodes, address, port, *words = machines.words(rank)
        assert words == list(machines.job.words[1:])
        assert (workdir, nodes, address) == (str(machines.work), "2", "gpu-0")
        assert port in ("29500", "24711")
    settings = [word for word in words if "=" in word]
    assert load_config(None, settings).model.name == UGLY
    assert not list(machines.folder.rglob("PWNED"))


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        (("0", "0"), 0),
        (("75", "75"), 75),
        (("65", "75"), 65),
        (("75", "65"), 65),
        (("75", "1"), 1),
        (("kill", "75"), 75),
        (("0", "77"), 77),
    ],
)
def test_one_code_for_all(script, machines, codes, expected):
    machines.codes(*codes)
    assert machines.run(script) == expected


def test_one_that_fails_stops_the_others(script, machines):
    machines.codes("wait", "65")
    assert machines.run(script) == 65
    assert machines.said("signal-0") == "TERM\n"


def test_one_that_was_left_alone_stops_the_others_later(script, machines):
    machines.codes("wait", "75")
    patience = f"SECONDS + {PATIENCE_SECONDS}"
    assert script.count(patience) == 1
    assert machines.run(script.replace(patience, "SECONDS + 1")) == 75
    assert machines.said("signal-0") == "TERM\n"


def test_one_that_is_done_does_not_stop_the_others(script, machines):
    machines.codes("wait", "0")
    process = machines.start(script)
    machines.until("began-0", "began-1")
    with pytest.raises(Exception, match="timed out"):
        process.wait(2)
    assert not machines.said("signal-0")
    assert machines.stop(process) == 75


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_lets_every_machine_save(script, machines, number):
    machines.codes("wait", "wait")
    process = machines.start(script)
    machines.until("began-0", "began-1")
    assert machines.stop(process, number) == 75
    assert machines.said("signal-0") == machines.said("signal-1") == "TERM\n"


def test_no_machine_goes_on_without_the_script(script, machines):
    machines.codes("wait", "wait")
    process = machines.start(script)
    machines.until("began-0", "began-1")
    assert machines.stop(process, signal.SIGKILL) == -signal.SIGKILL
    machines.until("signal-0", "signal-1")


@pytest.mark.parametrize("shell", [name for name in ("bash", "dash") if shutil.which(name)])
@pytest.mark.parametrize("numbers", [[signal.SIGTERM] * 3, [signal.SIGUSR1], [signal.SIGHUP]])
def test_a_signal_to_the_shell_of_a_machine_is_for_its_command(make_job, machines, shell, numbers):
    words = command_of(make_job(machines.python, workdir=str(machines.work)))
    machines.codes("wait")
    process = machines.popen([shell, *words[1:]], stdin=subprocess.PIPE)
    machines.until("began-0")
    for number in numbers:
        process.send_signal(number)
    assert process.wait(20) == 75
    assert machines.said("signal-0") == "TERM\n"


def test_a_folder_that_is_not_there(script, machines):
    machines.work.rmdir()
    assert machines.run(script) == 2
